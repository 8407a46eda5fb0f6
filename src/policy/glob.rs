//! Patterns for names of modules and parameters.
//!
//! `*` is any run of characters, dots included; `?` one character; `[a-z]`, `[!x]` one of a class; `{a,b}` alternatives;
//! a backslash takes the next character as it is. The whole name must match; case counts.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Most alternatives that the braces of one pattern may multiply to.
const MAX_ALTERNATIVES: usize = 256;

/// A checked pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    alternatives: Vec<Vec<Token>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Char(char),
    One,
    Run,
    Class { negated: bool, ranges: Vec<(char, char)> },
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// A sentence saying what is wrong with it.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("an empty pattern matches nothing; \"*\" matches every name".to_owned());
        }
        let chars: Vec<char> = text.chars().collect();
        let mut at = 0;
        let alternatives = sequence(&chars, &mut at, 0)?;
        if at < chars.len() {
            return Err(format!("pattern '{text}': '}}' without '{{'"));
        }
        Ok(Self { text: text.to_owned(), alternatives })
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// True if the whole of `name` matches.
    pub fn matches(&self, name: &str) -> bool {
        let name: Vec<char> = name.chars().collect();
        self.alternatives.iter().any(|tokens| matches(tokens, &name))
    }
}

/// Tokens up to the end, or up to the `,` or `}` that ends a branch of a brace; one list per alternative.
fn sequence(chars: &[char], at: &mut usize, depth: usize) -> Result<Vec<Vec<Token>>, String> {
    let text = || chars.iter().collect::<String>();
    let mut all = vec![Vec::new()];
    while let Some(&c) = chars.get(*at) {
        match c {
            '}' => break,
            ',' if depth > 0 => break,
            '{' => {
                *at += 1;
                let branches = braces(chars, at, depth + 1)?;
                if all.len() * branches.len() > MAX_ALTERNATIVES {
                    return Err(format!("pattern '{}' has more than {MAX_ALTERNATIVES} alternatives", text()));
                }
                all = all.iter().flat_map(|head| branches.iter().map(|b| [&head[..], &b[..]].concat())).collect();
            }
            _ => {
                let token = token(chars, at)?;
                all.iter_mut().for_each(|tokens| tokens.push(token.clone()));
            }
        }
    }
    Ok(all)
}

/// The branches of a brace, after its `{`, through its `}`.
fn braces(chars: &[char], at: &mut usize, depth: usize) -> Result<Vec<Vec<Token>>, String> {
    let mut branches = Vec::new();
    if depth > 8 {
        return Err(format!("pattern '{}' nests braces too deep", chars.iter().collect::<String>()));
    }
    loop {
        branches.extend(sequence(chars, at, depth)?);
        let end = chars.get(*at).copied();
        *at += 1;
        match end {
            Some('}') => return Ok(branches),
            Some(_) => {}
            None => return Err(format!("pattern '{}': '{{' without '}}'", chars.iter().collect::<String>())),
        }
    }
}

/// One token that is not a brace.
fn token(chars: &[char], at: &mut usize) -> Result<Token, String> {
    let c = chars[*at];
    *at += 1;
    match c {
        '*' => Ok(Token::Run),
        '?' => Ok(Token::One),
        '[' => class(chars, at),
        '\\' => {
            let next = chars.get(*at).ok_or_else(|| "a pattern cannot end in a backslash".to_owned())?;
            *at += 1;
            Ok(Token::Char(*next))
        }
        _ => Ok(Token::Char(c)),
    }
}

/// A class, after its `[`, through its `]`. A `]` that comes first stands for itself.
fn class(chars: &[char], at: &mut usize) -> Result<Token, String> {
    let negated = matches!(chars.get(*at), Some('!' | '^'));
    *at += usize::from(negated);
    let mut ranges = Vec::new();
    loop {
        let Some(&low) = chars.get(*at) else {
            return Err(format!("pattern '{}': '[' without ']'", chars.iter().collect::<String>()));
        };
        *at += 1;
        if low == ']' && !ranges.is_empty() {
            return Ok(Token::Class { negated, ranges });
        }
        match (chars.get(*at), chars.get(*at + 1)) {
            (Some('-'), Some(&high)) if high != ']' => {
                *at += 2;
                if high < low {
                    return Err(format!(
                        "pattern '{}': the range {low}-{high} is empty",
                        chars.iter().collect::<String>()
                    ));
                }
                ranges.push((low, high));
            }
            _ => ranges.push((low, low)),
        }
    }
}

/// Greedy matching that goes back to the last `*` only: linear in practice, quadratic at worst.
fn matches(tokens: &[Token], name: &[char]) -> bool {
    let (mut t, mut n) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        match tokens.get(t) {
            Some(Token::Run) => {
                t += 1;
                retry = Some((t, n));
                continue;
            }
            Some(token) if one(token, name[n]) => {
                t += 1;
                n += 1;
                continue;
            }
            _ => {}
        }
        let Some((after, from)) = retry else { return false };
        retry = Some((after, from + 1));
        t = after;
        n = from + 1;
    }
    tokens[t..].iter().all(|token| *token == Token::Run)
}

fn one(token: &Token, c: char) -> bool {
    match token {
        Token::Char(x) => *x == c,
        Token::One => true,
        Token::Run => false,
        Token::Class { negated, ranges } => ranges.iter().any(|&(low, high)| (low..=high).contains(&c)) != *negated,
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::new(&String::deserialize(from)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn hit(pattern: &str, name: &str) -> bool {
        Pattern::new(pattern).unwrap().matches(name)
    }

    #[test]
    fn matches_names() {
        assert!(hit("*.experts.*", "model.layers.3.experts.7.up.weight"));
        assert!(!hit("*.experts.*", "model.layers.3.mlp.weight"));
        assert!(hit("layers.?", "layers.3") && !hit("layers.?", "layers.13"));
        assert!(hit("layers.[0-3]", "layers.2") && !hit("layers.[0-3]", "layers.4"));
        assert!(hit("layers.[!0-3]", "layers.4"));
        assert!(hit("{embed,lm_head}*", "lm_head.weight") && !hit("{embed,lm_head}*", "layers.0"));
        assert!(hit("a{b,c{d,e}}f", "acef") && hit("a{b,}c", "ac"));
        assert!(hit("*", "") && hit("*", "a.b") && !hit("a", "ab") && !hit("ab", "a"));
        assert!(hit("*a*b*", "xxaxxbxx") && !hit("*a*b", "xxaxxbxx"));
        assert!(hit(r"a\*", "a*") && !hit(r"a\*", "ab"));
        assert!(hit("[]x]", "]"));
    }

    #[test]
    fn refuses_broken_patterns() {
        for bad in ["", "[a", "{a,b", "a}", "\\", "[z-a]", &"{a,b}".repeat(9), &"{".repeat(5000)] {
            assert!(Pattern::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn many_stars_end_quickly() {
        assert!(!hit(&"a*".repeat(40), &"a".repeat(39)));
        assert!(!hit(&format!("{}b", "*a".repeat(40)), &"a".repeat(400)));
    }
}
