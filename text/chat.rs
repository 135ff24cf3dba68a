//! Chat templates: a conversation as the one text that a model was trained to continue.
//!
//! A checkpoint brings its template as `chat_template` in `tokenizer_config.json` (a Jinja text, or a list of
//! named ones), as `chat_template.jinja` or as `chat_template.json`. It is rendered as transformers renders it:
//! the same environment (blocks trimmed, `break` and `continue`, `raise_exception`, `strftime_now`, `tojson`
//! that escapes nothing, Python's methods of strings, lists and dicts), the same variables (`messages`,
//! `add_generation_prompt`, `bos_token` and the other special tokens).
//!
//! Models that were published without one have theirs here: [`ChatTemplate::aquila`], [`ChatTemplate::glm`],
//! [`ChatTemplate::plato`].
//!
//! ```
//! use volary_text::chat::{ChatTemplate, Message};
//!
//! let template = ChatTemplate::new("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")?;
//! assert_eq!(template.render(&[Message::user("Hi")], false)?, "<user>Hi");
//! # Ok::<(), volary_text::chat::ChatError>(())
//! ```

mod python;
mod time;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior};
use serde::{Deserialize, Serialize};

use crate::tokenizer::{self, TokenizerError, read, utf8};

/// How many instructions a template may take: far more than a long conversation needs, and over in a second.
const FUEL: u64 = 5_000_000;

/// How long a rendered conversation may become, in bytes.
const LONGEST: usize = 64 << 20;

/// One turn of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said: a text, or the list of parts that templates for several media take.
    pub content: serde_json::Value,
    /// Whatever else the template looks at, `tool_calls` and the like.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A turn of this role.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Message {
        Message { role: role.into(), content: text.into().into(), more: serde_json::Map::new() }
    }

    /// What the model is to keep in mind.
    pub fn system(text: impl Into<String>) -> Message {
        Message::new("system", text)
    }

    /// What the user says.
    pub fn user(text: impl Into<String>) -> Message {
        Message::new("user", text)
    }

    /// What the model answered.
    pub fn assistant(text: impl Into<String>) -> Message {
        Message::new("assistant", text)
    }
}

/// Why a conversation did not become a text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// A file of the tokenizer cannot be read.
    #[error(transparent)]
    File(#[from] TokenizerError),
    /// A field holds something else than a template.
    #[error("{}: {field} must be a template, or a list of templates with names, found {found}", .file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field.
        field: &'static str,
        /// What it holds.
        found: String,
    },
    /// The templates have names, and this is none of them.
    #[error("{}: no chat template {wanted:?}; there are: {}", .file.display(), .known.join(", "))]
    NoSuchTemplate {
        /// The file.
        file: PathBuf,
        /// The name that was asked for.
        wanted: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// The template is not Jinja, or uses what it may not.
    #[error("{}: {message}", place("chat template", .line))]
    Syntax {
        /// The line of the template.
        line: Option<usize>,
        /// What is wrong there.
        message: String,
    },
    /// The template itself refused the conversation, by `raise_exception`.
    #[error("the chat template refuses this conversation: {0}")]
    Raised(String),
    /// The template ran for too long, or wrote too much.
    #[error("the chat template does not come to an end")]
    Endless,
    /// The template failed on this conversation.
    #[error("{}: {message}", place("chat template", .line))]
    Render {
        /// The line of the template.
        line: Option<usize>,
        /// What went wrong there.
        message: String,
    },
}

fn place(what: &str, line: &Option<usize>) -> String {
    line.map_or(what.to_owned(), |line| format!("{what}, line {line}"))
}

/// A chat template and the special tokens that it may use.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    variables: BTreeMap<String, Value>,
}

/// The name under which the environment keeps the template.
const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template, at first without special tokens.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] names the line.
    pub fn new(source: &str) -> Result<ChatTemplate, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| syntax_error(&error))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python::method);
        environment.set_formatter(python::print);
        environment.add_filter("tojson", python::to_json);
        environment.add_function("raise_exception", raise);
        environment.add_function("strftime_now", time::strftime_now);
        let source = without_generation_marks(source);
        environment.add_template_owned(NAME, source).map_err(|error| syntax_error(&error))?;
        Ok(ChatTemplate { environment, variables: BTreeMap::new() })
    }

    /// The template of a checkpoint folder; `None` if it brings none.
    ///
    /// Of several, the one that is called `default`.
    ///
    /// # Errors
    /// [`ChatError`] names the file and what is wrong with it.
    pub fn from_folder(dir: &Path) -> Result<Option<ChatTemplate>, ChatError> {
        ChatTemplate::named_from_folder(dir, "default")
    }

    /// The template of this name (`default`, `tool_use`, `rag`, ...) of a checkpoint folder; `None` if it
    /// brings none at all. A template without a name is taken for any name.
    ///
    /// # Errors
    /// As [`ChatTemplate::from_folder`], and [`ChatError::NoSuchTemplate`].
    pub fn named_from_folder(dir: &Path, name: &str) -> Result<Option<ChatTemplate>, ChatError> {
        let settings_file = dir.join("tokenizer_config.json");
        let settings = read_json(&settings_file)?;
        let jinja = dir.join("chat_template.jinja");
        let source = match read_text(&jinja)? {
            Some(source) => Some(source),
            None => {
                let file = dir.join("chat_template.json");
                match template_field(&file, read_json(&file)?.as_ref(), name)? {
                    Some(source) => Some(source),
                    None => template_field(&settings_file, settings.as_ref(), name)?,
                }
            }
        };
        let Some(source) = source else {
            return Ok(None);
        };
        let mut template = ChatTemplate::new(&source)?;
        let map = read_json(&dir.join("special_tokens_map.json"))?;
        // As for the tokenizer: the newer layout of the configuration is complete, the older is overridden.
        let newer = settings.as_ref().is_some_and(|settings| settings.get("added_tokens_decoder").is_some());
        let sources = if newer { [map, settings] } else { [settings, map] };
        for (name, token) in sources.iter().flatten().flat_map(special_tokens) {
            template = template.with_token(name, token);
        }
        Ok(Some(template))
    }

    /// AquilaChat: a sentence about the two, then `###Human: ...###Assistant: ...` (FlagAI's conversation).
    pub fn aquila() -> ChatTemplate {
        built_in(AQUILA)
    }

    /// Chinese GLM answers a question where `[gMASK]` stands (FlagAI's example for GLM-large-ch).
    pub fn glm() -> ChatTemplate {
        built_in(GLM)
    }

    /// English GLM, likewise.
    pub fn glm_english() -> ChatTemplate {
        built_in(GLM_ENGLISH)
    }

    /// PLATO: every turn ends with `[SEP]`, the answer begins with `[CLS]` (PaddleNLP's `dialogue_encode`).
    /// The marks are in the text, so it is to be encoded without further ones.
    pub fn plato() -> ChatTemplate {
        built_in(PLATO)
    }

    /// Lets the template see a special token under this name, as `bos_token`.
    pub fn with_token(mut self, name: &str, token: &str) -> ChatTemplate {
        self.variables.insert(name.to_owned(), Value::from(token));
        self
    }

    /// Lets the template see a value under this name, as `enable_thinking` or `tools`.
    pub fn with_variable(mut self, name: &str, value: &serde_json::Value) -> ChatTemplate {
        self.variables.insert(name.to_owned(), Value::from(Serde(value)));
        self
    }

    /// The text of a conversation. With `add_generation_prompt` it ends where the answer begins.
    ///
    /// # Errors
    /// [`ChatError::Raised`] if the template refuses the conversation, [`ChatError::Endless`] if it does not
    /// end, [`ChatError::Render`] if it fails otherwise.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let mut variables = self.variables.clone();
        variables.insert("messages".into(), Value::from(Serde(messages)));
        variables.insert("add_generation_prompt".into(), Value::from(add_generation_prompt));
        let template = self.environment.get_template(NAME).map_err(|error| syntax_error(&error))?;
        let mut text = Bounded(Vec::new());
        template
            .render_captured_to(Value::from(variables), &mut text)
            .map_err(|error| render_error(&error))?;
        String::from_utf8(text.0)
            .map_err(|error| ChatError::Render { line: None, message: error.utf8_error().to_string() })
    }
}

const AQUILA: &str = "\
{%- if messages and messages[0].role == 'system' -%}
{{ messages[0].content }}
{%- else -%}
A chat between a curious human and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the human's questions.
{%- endif -%}
###
{%- for message in messages if message.role != 'system' -%}
{{ 'Human' if message.role == 'user' else 'Assistant' }}: {{ message.content }}###
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
";

const GLM: &str = "\
{%- for message in messages -%}
{%- if message.role == 'user' -%}问题：{{ message.content }}回答：
{%- else -%}{{ message.content }}{{ '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}[gMASK]{%- endif -%}
";

const GLM_ENGLISH: &str = "\
{%- for message in messages -%}
{%- if message.role == 'user' -%}Question: {{ message.content }} Answer:{{ ' ' }}
{%- else -%}{{ message.content }}{{ '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}[gMASK]{%- endif -%}
";

const PLATO: &str = "\
[CLS]
{%- for message in messages -%}{{ message.content }}[SEP]{%- endfor -%}
{%- if add_generation_prompt -%}[CLS]{%- endif -%}
";

fn built_in(source: &str) -> ChatTemplate {
    ChatTemplate::new(source).expect("a template of ours compiles")
}

/// A text that may only become so long.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > LONGEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What `raise_exception` said.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise(message: Value) -> Result<Value, Error> {
    let raised = Raised(message.to_string());
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(raised))
}

fn message_of(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

fn syntax_error(error: &Error) -> ChatError {
    ChatError::Syntax { line: error.line(), message: message_of(error) }
}

fn render_error(error: &Error) -> ChatError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = source {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return ChatError::Raised(message.clone());
        }
        let kind = inner.downcast_ref::<Error>().map(Error::kind);
        if matches!(kind, Some(ErrorKind::OutOfFuel | ErrorKind::WriteFailure)) {
            return ChatError::Endless;
        }
        source = inner.source();
    }
    ChatError::Render { line: error.line(), message: message_of(error) }
}

/// `{% generation %}` marks what the assistant wrote, for training: here it is a block like any.
fn without_generation_marks(source: &str) -> String {
    let mut done = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        done.push_str(before);
        done.push_str("{%");
        let (inside, after) = match tag.split_once("%}") {
            Some((inside, after)) => (inside, Some(after)),
            None => (tag, None),
        };
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']);
        let replaced = match word.trim() {
            "generation" => inside.replacen("generation", "if true", 1),
            "endgeneration" => inside.replacen("endgeneration", "endif", 1),
            _ => inside.to_owned(),
        };
        done.push_str(&replaced);
        rest = after.map_or("", |after| {
            done.push_str("%}");
            after
        });
    }
    done + rest
}

/// `chat_template` of a JSON file: a text, or a list of `{"name", "template"}`.
fn template_field(
    file: &Path,
    values: Option<&serde_json::Value>,
    wanted: &str,
) -> Result<Option<String>, ChatError> {
    use serde_json::Value;
    const FIELD: &str = "chat_template";
    let wrong = |found: &Value| ChatError::Field {
        file: file.into(),
        field: FIELD,
        found: found.to_string().chars().take(80).collect(),
    };
    let named: Vec<(&str, &Value)> = match values.and_then(|values| values.get(FIELD)) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(source)) => return Ok(Some(source.clone())),
        Some(Value::Object(named)) => named.iter().map(|(name, source)| (name.as_str(), source)).collect(),
        Some(Value::Array(named)) => {
            let entries = named.iter().map(|entry| {
                let name = entry.get("name").and_then(Value::as_str);
                name.zip(entry.get("template")).ok_or_else(|| wrong(entry))
            });
            entries.collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong(other)),
    };
    match named.iter().find(|(name, _)| *name == wanted) {
        Some((_, Value::String(source))) => Ok(Some(source.clone())),
        Some((_, other)) => Err(wrong(other)),
        None => Err(ChatError::NoSuchTemplate {
            file: file.into(),
            wanted: wanted.into(),
            known: named.iter().map(|(name, _)| (*name).to_owned()).collect(),
        }),
    }
}

/// The tokens that a configuration names, `bos_token` and the like.
fn special_tokens(values: &serde_json::Value) -> impl Iterator<Item = (&str, &str)> {
    let fields = values.as_object().into_iter().flatten();
    fields.filter(|(name, _)| name.ends_with("_token")).filter_map(|(name, token)| {
        let token = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some((name.as_str(), token))
    })
}

fn read_text(file: &Path) -> Result<Option<String>, ChatError> {
    let Some(bytes) = read(file)? else {
        return Ok(None);
    };
    Ok(Some(utf8(file, &bytes)?.to_owned()))
}

fn read_json(file: &Path) -> Result<Option<serde_json::Value>, ChatError> {
    let Some(text) = read_text(file)? else {
        return Ok(None);
    };
    Ok(Some(tokenizer::read_json(file, text.as_bytes())?))
}

#[cfg(test)]
mod tests;
