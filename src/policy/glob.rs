//! Patterns for names of modules and parameters.
//!
//! `*` is any run of characters, dots included; `?` one character; `[a-z]`, `[!x]` one of a class; `{a,b}` alternatives;
//! a backslash takes the next character as it is. The whole name must match; case counts.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Longest pattern, in characters.
const MAX_LENGTH: usize = 1_024;

/// Deepest nesting of braces.
const MAX_DEPTH: usize = 8;

/// A checked pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    /// A state machine: each step takes a character or leads on. Its length grows with the pattern's, braces or not.
    steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Char(char),
    One,
    Run,
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
    /// Goes on at each of these steps: the branches of a brace.
    Fork(Vec<usize>),
    /// Goes on at that step: the end of a branch.
    Jump(usize),
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
        let chars: Vec<char> = text.chars().take(MAX_LENGTH + 1).collect();
        if chars.len() > MAX_LENGTH {
            let length = text.chars().count();
            return Err(format!("a pattern of {length} characters; the longest has {MAX_LENGTH}"));
        }
        let (mut at, mut steps) = (0, Vec::new());
        sequence(&chars, &mut at, 0, &mut steps)?;
        if at < chars.len() {
            return Err(format!("pattern '{text}': '}}' without '{{'"));
        }
        Ok(Self { text: text.to_owned(), steps })
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// True if the whole of `name` matches. Takes time in proportion to both lengths, at worst to their product.
    pub fn matches(&self, name: &str) -> bool {
        let (mut now, mut next) = (Reached::new(&self.steps), Reached::new(&self.steps));
        now.add(0);
        for c in name.chars() {
            next.clear();
            for at in now.list.drain(..) {
                match self.steps.get(at) {
                    Some(Step::Run) => next.add(at),
                    Some(step) if takes(step, c) => next.add(at + 1),
                    _ => {}
                }
            }
            std::mem::swap(&mut now, &mut next);
        }
        now.list.contains(&self.steps.len())
    }
}

/// The steps that a name has led to so far. The end is one more than the last step.
struct Reached<'a> {
    steps: &'a [Step],
    list: Vec<usize>,
    seen: Vec<bool>,
    todo: Vec<usize>,
}

impl<'a> Reached<'a> {
    fn new(steps: &'a [Step]) -> Self {
        Self { steps, list: Vec::new(), seen: vec![false; steps.len() + 1], todo: Vec::new() }
    }

    fn clear(&mut self) {
        self.list.clear();
        self.seen.fill(false);
    }

    /// A step, and those that it leads to without a character.
    fn add(&mut self, step: usize) {
        self.todo.push(step);
        while let Some(at) = self.todo.pop() {
            if std::mem::replace(&mut self.seen[at], true) {
                continue;
            }
            match self.steps.get(at) {
                Some(Step::Fork(branches)) => self.todo.extend(branches),
                Some(Step::Jump(to)) => self.todo.push(*to),
                Some(Step::Run) => {
                    self.list.push(at);
                    self.todo.push(at + 1);
                }
                _ => self.list.push(at),
            }
        }
    }
}

/// Steps up to the end, or up to the `,` or `}` that ends a branch of a brace.
fn sequence(chars: &[char], at: &mut usize, depth: usize, steps: &mut Vec<Step>) -> Result<(), String> {
    while let Some(&c) = chars.get(*at) {
        match c {
            '}' => break,
            ',' if depth > 0 => break,
            '{' => {
                *at += 1;
                braces(chars, at, depth + 1, steps)?;
            }
            _ => steps.push(token(chars, at)?),
        }
    }
    Ok(())
}

/// The branches of a brace, after its `{`, through its `}`.
fn braces(chars: &[char], at: &mut usize, depth: usize, steps: &mut Vec<Step>) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("pattern '{}' nests braces too deep", chars.iter().collect::<String>()));
    }
    let fork = steps.len();
    steps.push(Step::Fork(Vec::new()));
    let (mut branches, mut ends) = (Vec::new(), Vec::new());
    loop {
        branches.push(steps.len());
        sequence(chars, at, depth, steps)?;
        let end = chars.get(*at).copied();
        *at += 1;
        match end {
            Some('}') => break,
            Some(_) => {
                ends.push(steps.len());
                steps.push(Step::Jump(0));
            }
            None => return Err(format!("pattern '{}': '{{' without '}}'", chars.iter().collect::<String>())),
        }
    }
    for end in ends {
        steps[end] = Step::Jump(steps.len());
    }
    steps[fork] = Step::Fork(branches);
    Ok(())
}

/// One token that is not a brace.
fn token(chars: &[char], at: &mut usize) -> Result<Step, String> {
    let c = chars[*at];
    *at += 1;
    match c {
        '*' => Ok(Step::Run),
        '?' => Ok(Step::One),
        '[' => class(chars, at),
        '\\' => {
            let next = chars.get(*at).ok_or_else(|| "a pattern cannot end in a backslash".to_owned())?;
            *at += 1;
            Ok(Step::Char(*next))
        }
        _ => Ok(Step::Char(c)),
    }
}

/// A class, after its `[`, through its `]`. A `]` that comes first stands for itself.
fn class(chars: &[char], at: &mut usize) -> Result<Step, String> {
    let negated = matches!(chars.get(*at), Some('!' | '^'));
    *at += usize::from(negated);
    let mut ranges = Vec::new();
    loop {
        let Some(&low) = chars.get(*at) else {
            return Err(format!("pattern '{}': '[' without ']'", chars.iter().collect::<String>()));
        };
        *at += 1;
        if low == ']' && !ranges.is_empty() {
            return Ok(Step::Class { negated, ranges });
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

fn takes(step: &Step, c: char) -> bool {
    match step {
        Step::Char(x) => *x == c,
        Step::One => true,
        Step::Class { negated, ranges } => ranges.iter().any(|&(low, high)| (low..=high).contains(&c)) != *negated,
        Step::Run | Step::Fork(_) | Step::Jump(_) => false,
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
        for bad in ["", "[a", "{a,b", "a}", "\\", "[z-a]", &"{".repeat(50), &"{".repeat(5000)] {
            assert!(Pattern::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn alternatives_do_not_multiply() {
        let pattern = Pattern::new(&"{a,b,}".repeat(150)).unwrap();
        assert!(pattern.steps.len() < 1_000);
        assert!(pattern.matches(&"ab".repeat(75)) && !pattern.matches(&"ab".repeat(76)) && !pattern.matches("c"));
        assert!(hit("x{a,{b,c*}d}{,y}", "xcddy") && !hit("x{a,{b,c*}d}{,y}", "xcy"));
        let error = Pattern::new(&"*a".repeat(1 << 19)).unwrap_err();
        assert_eq!(error, "a pattern of 1048576 characters; the longest has 1024");
        assert!(Pattern::new(&"ö".repeat(1024)).unwrap().matches(&"ö".repeat(1024)));
    }

    #[test]
    fn many_stars_end_quickly() {
        assert!(!hit(&"a*".repeat(40), &"a".repeat(39)));
        assert!(!hit(&format!("{}b", "*a".repeat(40)), &"a".repeat(400)));
    }
}
