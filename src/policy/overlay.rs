//! Single keys from the environment and from `--set`, on top of a policy.

use super::{
    Policy, parse_toml,
    schema::{self, Kind},
    source::{Node, Source, Value},
    suggest,
};
use crate::error::{Code, Error, Result};

/// Environment variables of this prefix set keys.
const PREFIX: &str = "FUNICULAR_";

impl Policy {
    /// Sets one key by its dotted path, as `--set budget.hbm=12GiB` does. The value is written as in the file; quotes
    /// around strings may be left out, and a list may be separated by commas.
    ///
    /// # Errors
    /// `FN-E502` for an unknown key, `FN-E503` for a value it does not take; the policy is unchanged then.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        self.set_from(key, value, &format!("--set {key}={value}"))
    }

    /// Applies `FUNICULAR_BUDGET__HBM=12GiB` and the like: a double underscore stands for the dot. Variables without
    /// the prefix, or without a double underscore, are left alone, except `FUNICULAR_DEVICE` and `FUNICULAR_VERSION`. Bytes that are
    /// not UTF-8 are given as U+FFFD.
    ///
    /// # Errors
    /// As for [`Policy::set`], naming the variable.
    pub fn with_env<K: AsRef<str>, V: AsRef<str>>(mut self, vars: impl IntoIterator<Item = (K, V)>) -> Result<Self> {
        let mut found: Vec<(String, String, String)> = Vec::new();
        for (name, value) in vars {
            let (name, value) = (name.as_ref(), value.as_ref());
            if let Some(key) = env_key(name)? {
                if value.contains(char::REPLACEMENT_CHARACTER) {
                    let text = format!("environment {name}: its value is not valid UTF-8.");
                    return Err(Error::new(Code::PolicyValue, text).action("Set it anew, or unset it."));
                }
                found.push((name.to_owned(), key, value.to_owned()));
            }
        }
        found.sort();
        for (name, key, value) in found {
            self.set_from(&key, &value, &format!("environment {name}={value}"))?;
        }
        Ok(self)
    }

    fn set_from(&mut self, key: &str, value: &str, origin: &str) -> Result<()> {
        let source = Source::named(origin);
        let kind = match (schema::find(key), key) {
            (Some(known), _) => Some(known.kind),
            (None, "override") => None,
            (None, _) => return Err(unknown(&source, key)),
        };
        let mut root = self.to_node()?;
        root.put(&key.split('.').collect::<Vec<_>>(), written(kind, value));
        *self = Self::from_node(&source, &root)?;
        Ok(())
    }
}

/// The dotted key that a variable stands for.
fn env_key(name: &str) -> Result<Option<String>> {
    let Some(rest) = name.strip_prefix(PREFIX) else { return Ok(None) };
    let key = rest.to_ascii_lowercase().replace("__", ".");
    if key.contains('.') || matches!(key.as_str(), "device" | "version" | "override") {
        return Ok(Some(key));
    }
    match schema::paths().iter().find(|p| p.replace('.', "_") == key) {
        None => Ok(None),
        Some(path) => {
            let right = format!("{PREFIX}{}", path.replace('.', "__").to_ascii_uppercase());
            Err(Error::new(Code::PolicyKey, format!("environment {name}: unknown key (did you mean {right}?)."))
                .action("A double underscore stands for the dot."))
        }
    }
}

fn unknown(source: &Source<'_>, key: &str) -> Error {
    let paths = schema::paths();
    let prefix = format!("{key}.");
    if paths.iter().any(|p| p.starts_with(&prefix)) {
        let inside: Vec<&str> = paths.iter().filter_map(|p| p.strip_prefix(&prefix)).collect();
        let what = format!("'{key}' is a section; set one of its keys: {}", inside.join(", "));
        return source.error(Code::PolicyKey, None, &what);
    }
    let (section, leaf) = key.rsplit_once('.').unwrap_or(("", key));
    let near = suggest::nearest(key, paths.iter().copied())
        .map(ToString::to_string)
        .or_else(|| paths.iter().find(|p| p.rsplit('.').next() == Some(leaf)).map(ToString::to_string));
    let hint = near.map_or_else(String::new, |n| format!(" (did you mean '{n}'?)"));
    let inside: Vec<&str> =
        paths.iter().filter(|p| p.rsplit_once('.').is_some_and(|(s, _)| s == section)).copied().collect();
    let valid = if inside.is_empty() { paths } else { inside };
    source
        .error(Code::PolicyKey, None, &format!("unknown key '{key}'{hint}"))
        .action(format!("Valid keys: {}.", valid.join(", ")))
}

/// A value as a person types it: TOML where the key takes it, else text.
fn written(kind: Option<Kind>, value: &str) -> Node {
    let value = value.trim();
    let text = || Node::made(Value::Text(value.to_owned()));
    let document = format!("x = {value}\n");
    let parsed = parse_toml::parse(&Source::named("value"), &document).ok().and_then(|n| n.get("x").cloned());
    let parsed = parsed.map(unplaced);
    match (kind, parsed) {
        (_, Some(node @ Node { value: Value::Text(_) | Value::List(_), .. })) => node,
        (Some(Kind::Patterns | Kind::Paths | Kind::Steps), _) => list(kind, value),
        (Some(Kind::Text | Kind::Size | Kind::AutoSize | Kind::Device | Kind::Word(_) | Kind::Pattern), _) => text(),
        (_, Some(node)) => node,
        (_, None) => text(),
    }
}

/// A list separated by commas.
fn list(kind: Option<Kind>, value: &str) -> Node {
    let items = value.split(',').map(str::trim).filter(|item| !item.is_empty());
    let item = |item: &str| match item.parse() {
        Ok(n) if kind == Some(Kind::Steps) => Value::Integer(n),
        _ => Value::Text(item.to_owned()),
    };
    Node::made(Value::List(items.map(|i| Node::made(item(i))).collect()))
}

/// Removes the spans: they point into the text that `written` made up, not into a file.
fn unplaced(mut node: Node) -> Node {
    node.span = None;
    node.value = match node.value {
        Value::List(items) => Value::List(items.into_iter().map(unplaced).collect()),
        Value::Table(mut entries) => {
            for entry in &mut entries {
                entry.span = None;
                let empty = Node::made(Value::Null);
                entry.node = unplaced(std::mem::replace(&mut entry.node, empty));
            }
            Value::Table(entries)
        }
        other => other,
    };
    node
}
