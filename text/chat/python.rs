//! Values as Python writes them.

use std::io;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State};
use minijinja_contrib::pycompat;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Prints a value: `True`, `None`, `['a', 1]`.
pub(super) fn print(out: &mut Output, _state: &mut State, value: &Value) -> Result<(), Error> {
    out.write_str(&text(value)).map_err(Error::from)
}

fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool if value.is_true() => "True".to_owned(),
        ValueKind::Bool => "False".to_owned(),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<String> =
                value.try_iter().into_iter().flatten().map(|item| quoted(&item)).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let keys = value.try_iter().into_iter().flatten();
            let items = keys.map(|key| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", quoted(&key), quoted(&item))
            });
            format!("{{{}}}", items.collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

/// Python's methods of strings, lists and dicts.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (name, value.as_str()) {
        // minijinja-contrib's begins words after white space only.
        ("title", Some(text)) if args.is_empty() => Ok(Value::from(title(text))),
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// A capital wherever a letter follows what is none.
fn title(text: &str) -> String {
    let mut begins = true;
    let mut done = String::with_capacity(text.len());
    for c in text.chars() {
        match begins {
            true => done.extend(c.to_uppercase()),
            false => done.extend(c.to_lowercase()),
        }
        begins = !c.is_alphabetic();
    }
    done
}

/// A value within a list: strings have quotes.
fn quoted(value: &Value) -> String {
    let Some(string) = value.as_str() else {
        return text(value);
    };
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    let mut done = String::from(quote);
    for c in string.chars() {
        match c {
            '\n' => done.push_str("\\n"),
            '\r' => done.push_str("\\r"),
            '\t' => done.push_str("\\t"),
            c if c == quote || c == '\\' => done.extend(['\\', c]),
            c => done.push(c),
        }
    }
    done.push(quote);
    done
}

/// `json.dumps` with `ensure_ascii=False`: no character is escaped that need not be.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let sort: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.as_str(), key],
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators must be two")),
        None if indent.is_some() => [",", ": "],
        None => [", ", ": "],
    };
    let spaces = " ".repeat(indent.unwrap_or(0).min(64));
    let pretty = indent.map(|_| PrettyFormatter::with_indent(spaces.as_bytes()));
    let mut json = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut json, Dumps { item, key, pretty });
    let written = match sort.unwrap_or(false) {
        // serde_json's own values keep their keys in order.
        true => serde_json::to_value(value).and_then(|sorted| sorted.serialize(&mut serializer)),
        false => value.serialize(&mut serializer),
    };
    let wrong = |error: String| Error::new(ErrorKind::BadSerialization, error);
    written.map_err(|error| wrong(error.to_string()))?;
    String::from_utf8(json).map(Value::from).map_err(|error| wrong(error.to_string()))
}

/// Python's separators, and serde_json's lines where an indent is wanted.
struct Dumps<'a> {
    item: &'a str,
    key: &'a str,
    pretty: Option<PrettyFormatter<'a>>,
}

impl Dumps<'_> {
    fn separate<W: ?Sized + io::Write>(&self, out: &mut W, first: bool) -> io::Result<()> {
        match first {
            true => Ok(()),
            false => out.write_all(self.item.as_bytes()),
        }
    }
}

impl Formatter for Dumps<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.begin_array(out),
            None => out.write_all(b"["),
        }
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.end_array(out),
            None => out.write_all(b"]"),
        }
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.separate(out, first)?;
        match &mut self.pretty {
            Some(pretty) => pretty.begin_array_value(out, true),
            None => Ok(()),
        }
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.end_array_value(out),
            None => Ok(()),
        }
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.begin_object(out),
            None => out.write_all(b"{"),
        }
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.end_object(out),
            None => out.write_all(b"}"),
        }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.separate(out, first)?;
        match &mut self.pretty {
            Some(pretty) => pretty.begin_object_key(out, true),
            None => Ok(()),
        }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.end_object_value(out),
            None => Ok(()),
        }
    }
}
