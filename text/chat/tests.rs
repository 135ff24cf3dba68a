use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use super::*;

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: String,
}

/// Texts that transformers 5.23 renders from the same templates.
#[test]
fn templates_give_the_texts_of_python() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/chat/cases.json");
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert!(cases.len() > 30);
    for Case { name, template, messages, add_generation_prompt, text } in cases {
        let template = ChatTemplate::new(&template).unwrap();
        let template = template.with_token("bos_token", "<s>").with_token("eos_token", "</s>");
        assert_eq!(template.render(&messages, add_generation_prompt).unwrap(), text, "{name}");
    }
}

fn dialogue() -> Vec<Message> {
    vec![Message::user("你好"), Message::assistant("你好！"), Message::user("1+1=?")]
}

#[test]
fn aquila_speaks_as_human_and_assistant() {
    let text = "A chat between a curious human and an artificial intelligence assistant. \
        The assistant gives helpful, detailed, and polite answers to the human's questions.\
        ###Human: 你好###Assistant: 你好！###Human: 1+1=?###";
    let aquila = ChatTemplate::aquila();
    assert_eq!(aquila.render(&dialogue(), false).unwrap(), text);
    assert_eq!(aquila.render(&dialogue(), true).unwrap(), format!("{text}Assistant:"));
    let told = [Message::system("Be brief."), Message::user("Hi")];
    assert_eq!(aquila.render(&told, true).unwrap(), "Be brief.###Human: Hi###Assistant:");
}

#[test]
fn glm_fills_its_answer_in() {
    let text = "问题：你好回答：你好！\n问题：1+1=?回答：";
    assert_eq!(ChatTemplate::glm().render(&dialogue(), false).unwrap(), text);
    assert_eq!(ChatTemplate::glm().render(&dialogue(), true).unwrap(), format!("{text}[gMASK]"));
    let asked = [Message::user("Who?")];
    assert_eq!(ChatTemplate::glm_english().render(&asked, true).unwrap(), "Question: Who? Answer: [gMASK]");
}

#[test]
fn plato_separates_turns() {
    let plato = ChatTemplate::plato();
    assert_eq!(plato.render(&dialogue(), false).unwrap(), "[CLS]你好[SEP]你好！[SEP]1+1=?[SEP]");
    assert_eq!(plato.render(&dialogue(), true).unwrap(), "[CLS]你好[SEP]你好！[SEP]1+1=?[SEP][CLS]");
    assert_eq!(plato.render(&[], false).unwrap(), "[CLS]");
}

fn error(template: &str) -> ChatError {
    match ChatTemplate::new(template) {
        Ok(template) => template.render(&dialogue(), true).unwrap_err(),
        Err(error) => error,
    }
}

#[test]
fn a_template_that_refuses_fails_or_never_ends_is_an_error_of_its_own() {
    let raised = error("{% if messages[0].role == 'user' %}{{ raise_exception('system first') }}{% endif %}");
    assert!(matches!(&raised, ChatError::Raised(message) if message == "system first"), "{raised}");
    assert_eq!(raised.to_string(), "the chat template refuses this conversation: system first");

    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
    assert!(matches!(error(endless), ChatError::Endless));
    let grows = "{% set n = namespace(t='x' * 1000000) %}{% for a in range(999) %}{{ n.t }}{% endfor %}";
    assert!(matches!(error(grows), ChatError::Endless));
    let recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(matches!(error(recursive), ChatError::Render { .. } | ChatError::Endless));

    for (template, expected) in [
        ("a\n{% for m in messages %}", "chat template, line 2: syntax error"),
        ("{{ messages", "chat template, line 1: syntax error"),
        ("{{ x | no_such_filter }}", "no_such_filter"),
        ("\n{{ nothing.at_all }}", "chat template, line 2: undefined value"),
        ("{{ messages[0].content.no_method() }}", "unknown method"),
        ("{{ no_function() }}", "unknown function"),
        ("{% include 'secrets' %}", "template not found"),
    ] {
        let error = error(template).to_string();
        assert!(error.contains(expected), "{error}\nshould contain\n{expected}");
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn with(files: &[(&str, &[u8])]) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        for (name, bytes) in files {
            std::fs::write(folder.0.path().join(name), bytes).unwrap();
        }
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn text(&self) -> String {
        let template = ChatTemplate::from_folder(self.path()).unwrap().unwrap();
        template.render(&[Message::user("x")], false).unwrap()
    }

    fn error(&self) -> String {
        ChatTemplate::from_folder(self.path()).unwrap_err().to_string()
    }
}

#[test]
fn a_folder_brings_its_template_and_its_tokens() {
    assert!(ChatTemplate::from_folder(Folder::with(&[]).path()).unwrap().is_none());
    let template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template});
    let config = config.to_string();
    let folder = Folder::with(&[("tokenizer_config.json", config.as_bytes())]);
    assert_eq!(folder.text(), "<s>x</s>");
    let map = br#"{"bos_token": "<b>"}"#;
    let folder =
        Folder::with(&[("tokenizer_config.json", config.as_bytes()), ("special_tokens_map.json", map)]);
    assert_eq!(folder.text(), "<b>x</s>");
    let jinja = ("chat_template.jinja", &b"J{{ bos_token }}"[..]);
    assert_eq!(Folder::with(&[("tokenizer_config.json", config.as_bytes()), jinja]).text(), "J<s>");
    let own = ("chat_template.json", &br#"{"chat_template": "own"}"#[..]);
    assert_eq!(Folder::with(&[("tokenizer_config.json", config.as_bytes()), own]).text(), "own");

    let named = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]});
    let folder = Folder::with(&[("tokenizer_config.json", named.to_string().as_bytes())]);
    assert_eq!(folder.text(), "plain");
    let tools = ChatTemplate::named_from_folder(folder.path(), "tool_use").unwrap().unwrap();
    assert_eq!(tools.render(&[], false).unwrap(), "tools");
    let error = ChatTemplate::named_from_folder(folder.path(), "rag").unwrap_err().to_string();
    assert!(error.ends_with(r#"no chat template "rag"; there are: default, tool_use"#), "{error}");
}

#[test]
fn broken_template_files_are_named() {
    for (file, bytes, expected) in [
        ("tokenizer_config.json", &b"{"[..], "tokenizer_config.json: EOF"),
        ("tokenizer_config.json", br#"{"chat_template": 7}"#, "chat_template must be a template"),
        ("tokenizer_config.json", br#"{"chat_template": [{"name": "default"}]}"#, "found {\"name\""),
        ("tokenizer_config.json", br#"{"chat_template": [{"name": "default", "template": 1}]}"#, "found 1"),
        ("tokenizer_config.json", br#"{"chat_template": "{% if %}"}"#, "chat template, line 1: syntax error"),
        ("chat_template.jinja", b"ab\xff", "chat_template.jinja: not UTF-8 at byte 2"),
    ] {
        let error = Folder::with(&[(file, bytes)]).error();
        assert!(error.contains(expected), "{error}\nshould contain\n{expected}");
    }
}

#[test]
fn messages_keep_what_else_they_say() {
    let message: Message =
        serde_json::from_value(json!({"role": "tool", "content": null, "name": "add"})).unwrap();
    let template =
        ChatTemplate::new("{{ messages[0].name }} {{ flag }}").unwrap().with_variable("flag", &json!(true));
    assert_eq!(template.render(&[message], false).unwrap(), "add True");
}
