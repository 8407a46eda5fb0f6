//! Arithmetic on plain numbers, as scripts write sizes: `1 << 20`, `2 * 1024**2`, `int(0.9 * 10**6)`.

use super::source::Value;

/// Longest text that is computed, in bytes.
const MAX_TEXT: usize = 200;

/// Operators from those that bind least.
const LEVELS: &[&[&str]] = &[&["<<", ">>"], &["+", "-"], &["//", "*", "/"]];

/// What an expression of numbers alone comes to; `None` for every other text, and where a result is too large.
pub(super) fn value(text: &str) -> Option<Value> {
    if text.len() > MAX_TEXT {
        return None;
    }
    let mut terms = Terms { rest: text };
    let found = terms.level(0)?;
    terms.rest.trim_start().is_empty().then_some(found)
}

struct Terms<'t> {
    rest: &'t str,
}

impl Terms<'_> {
    fn take(&mut self, word: &str) -> bool {
        match self.rest.trim_start().strip_prefix(word) {
            Some(rest) => self.rest = rest,
            None => return false,
        }
        true
    }

    fn level(&mut self, level: usize) -> Option<Value> {
        let Some(operators) = LEVELS.get(level) else { return self.signed() };
        let mut left = self.level(level + 1)?;
        while let Some(operator) = operators.iter().find(|operator| self.take(operator)) {
            let right = self.level(level + 1)?;
            left = combined(operator, &left, &right)?;
        }
        Some(left)
    }

    /// A power binds more than the sign before it, and less than the one behind.
    fn signed(&mut self) -> Option<Value> {
        if self.take("-") {
            let found = self.signed()?;
            return combined("-", &Value::Integer(0), &found);
        }
        let base = self.atom()?;
        if !self.take("**") {
            return Some(base);
        }
        let power = self.signed()?;
        combined("**", &base, &power)
    }

    fn atom(&mut self) -> Option<Value> {
        if self.take("(") {
            let found = self.level(0)?;
            return self.take(")").then_some(found);
        }
        let text = self.rest.trim_start();
        let mut end = 0;
        for (at, c) in text.char_indices() {
            let sign = matches!(c, '+' | '-') && text[..at].ends_with(['e', 'E']);
            if !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_') || sign) {
                break;
            }
            end = at + 1;
        }
        self.rest = &text[end..];
        let digits = text[..end].replace('_', "");
        if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            return None;
        }
        let whole = digits.parse().map(Value::Integer);
        whole.ok().or_else(|| digits.parse().ok().filter(|x: &f64| x.is_finite()).map(Value::Float))
    }
}

fn combined(operator: &str, left: &Value, right: &Value) -> Option<Value> {
    if let (Value::Integer(a), Value::Integer(b)) = (left, right)
        && operator != "/"
        && !(operator == "**" && *b < 0)
    {
        let small = u32::try_from(*b);
        return match operator {
            "+" => a.checked_add(*b),
            "-" => a.checked_sub(*b),
            "*" => a.checked_mul(*b),
            "//" => a.checked_div_euclid(*b).filter(|_| *b > 0),
            "**" => a.checked_pow(small.ok()?),
            "<<" => a.checked_mul(2_i64.checked_pow(small.ok()?)?),
            ">>" => a.checked_shr(small.ok()?),
            _ => None,
        }
        .map(Value::Integer);
    }
    let (a, b) = (number(left)?, number(right)?);
    let found = match operator {
        "+" => a + b,
        "-" => a - b,
        "*" => a * b,
        "/" => a / b,
        "//" => (a / b).floor(),
        "**" => a.powf(b),
        _ => return None,
    };
    found.is_finite().then_some(Value::Float(found))
}

#[expect(clippy::cast_precision_loss, reason = "Python does the same")]
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(n) => Some(*n as f64),
        Value::Float(x) => Some(*x),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_python() {
        for (text, want) in [
            ("1 << 20", 1_048_576.0),
            ("2 * 1024**2", 2_097_152.0),
            ("10**9", 1e9),
            ("1_000 * (2 + 3)", 5_000.0),
            ("-2**2", -4.0),
            ("2**-1", 0.5),
            ("2**3**2", 512.0),
            ("7 // 2 * 2", 6.0),
            ("1 + 2 << 3", 24.0),
            ("7 - 2 - 1", 4.0),
            ("1e-3 * 2", 0.002),
            ("256 >> 4", 16.0),
            ("5e8 / 4", 1.25e8),
        ] {
            assert_eq!(value(text).as_ref().and_then(number), Some(want), "{text}");
        }
    }

    #[test]
    fn leaves_everything_else() {
        for text in [
            "",
            "n * 2",
            "2 *",
            "(1",
            "1)",
            "1 / 0",
            "1 // 0",
            "2 ** 99",
            "1 << 64",
            "9 ** 9 ** 9",
            "1 2",
            "a",
            "0x10 + 1",
        ] {
            assert!(value(text).is_none(), "{text}");
        }
        assert!(value(&format!("1{}", "+1".repeat(200))).is_none());
    }
}
