//! Values as people and tools write them: booleans as strings, counts as floats or strings, sizes in elements.

use crate::{
    policy::source::{CALLEE, Node, Value},
    quantities::ByteCount,
};

/// A value read, and a remark if it was written in an odd way.
pub(super) struct Read<T> {
    pub(super) value: T,
    pub(super) remark: Option<&'static str>,
}

/// True for `"auto"`, which the Hugging Face Trainer fills in.
pub(super) fn is_auto(node: &Node) -> bool {
    matches!(&node.value, Value::Text(text) if text.trim() == "auto")
}

/// What is wrong with a value that only running the script would tell.
pub(super) const COMPUTED: &str =
    "is computed by the script; put its value there and import again, or set it in the policy";

/// What is wrong with a value that another program puts in.
const FILLED_IN: &str =
    "is filled in by another program; put its value there and import again, or set it in the policy";

/// What is wrong with a value that the file does not have: a call or an expression of Python, a placeholder of a template.
pub(super) fn elsewhere(node: &Node) -> Option<&'static str> {
    match &node.value {
        Value::Code(_) => Some(COMPUTED),
        Value::Table(_) if node.get(CALLEE).is_some() => Some(COMPUTED),
        Value::Text(text) => {
            let text = text.trim();
            let whole = text.starts_with('$') || (text.starts_with('<') && text.ends_with('>'));
            (whole || text.contains("{{") || text.contains("${")).then_some(FILLED_IN)
        }
        _ => None,
    }
}

/// The fault of a value of another kind.
fn fault<T>(node: &Node, wrong: &str) -> Result<T, String> {
    Err(elsewhere(node).unwrap_or(wrong).to_owned())
}

/// A boolean; `"true"`, `"false"`, 0 and 1 too.
pub(super) fn flag(node: &Node) -> Result<Read<bool>, String> {
    let odd = |value, remark| Ok(Read { value, remark: Some(remark) });
    match &node.value {
        Value::Bool(value) => Ok(Read { value: *value, remark: None }),
        Value::Integer(0) => odd(false, "written as a number"),
        Value::Integer(1) => odd(true, "written as a number"),
        Value::Text(text) => match text.trim().to_ascii_lowercase().as_str() {
            "true" | "yes" => odd(true, "written as a string"),
            "false" | "no" => odd(false, "written as a string"),
            _ => fault(node, "is not true or false"),
        },
        _ => fault(node, "is not true or false"),
    }
}

/// A count from 0; `1e9`, `"5e8"` and `"8M"` (a power of 1024, as the tuner writes) too.
pub(super) fn count(node: &Node) -> Result<Read<u64>, String> {
    let fault = || elsewhere(node).unwrap_or("is not a whole number from 0").to_owned();
    match &node.value {
        Value::Integer(n) => u64::try_from(*n).map(|value| Read { value, remark: None }).map_err(|_| fault()),
        Value::Float(x) => whole(*x).map(|value| Read { value, remark: None }).ok_or_else(fault),
        Value::Text(text) => {
            let text = text.trim();
            let (digits, scale) = match text.chars().last() {
                Some('K' | 'k') => (&text[..text.len() - 1], 1 << 10),
                Some('M' | 'm') => (&text[..text.len() - 1], 1 << 20),
                Some('G' | 'g') => (&text[..text.len() - 1], 1 << 30),
                _ => (text, 1_u64),
            };
            let number = digits.parse::<u64>().ok().or_else(|| digits.parse::<f64>().ok().and_then(whole));
            let value = number.and_then(|n| n.checked_mul(scale)).ok_or_else(fault)?;
            Ok(Read { value, remark: Some("written as a string") })
        }
        _ => Err(fault()),
    }
}

/// A share from 0 to 1.
pub(super) fn share(node: &Node) -> Result<f64, String> {
    let x = match &node.value {
        #[expect(clippy::cast_precision_loss, reason = "only 0 and 1 pass")]
        Value::Integer(n) => *n as f64,
        Value::Float(x) => *x,
        Value::Text(text) => text.trim().parse().unwrap_or(f64::NAN),
        _ => f64::NAN,
    };
    if (0.0..=1.0).contains(&x) { Ok(x) } else { fault(node, "is not a number from 0 to 1") }
}

/// A float that stands for a whole number, capped at the largest that is exact enough to matter.
fn whole(x: f64) -> Option<u64> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked, and the cast saturates")]
    (x >= 0.0 && x.fract() == 0.0 && x.is_finite()).then_some(x as u64)
}

/// Bytes of so many elements; `None` if that is more than any machine has, which such files use for "no limit".
pub(super) fn bytes(elements: u64, each: u64) -> Option<ByteCount> {
    elements.checked_mul(each).map(ByteCount).filter(|b| *b < ByteCount::gib(1 << 10))
}
