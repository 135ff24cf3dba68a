//! Conversations: the turns so far, as much of them as fits, as the text that a model was trained to continue.

use std::ops::ControlFlow;

use volary_text::chat::{ChatTemplate, Message};
use volary_text::generate::{Piece, Rank, Settings, Written, rank};

use crate::error::Error;
use crate::folder::Folder;
use crate::registry::{System, first_config};
use crate::writer::Writer;

/// How a model was trained to converse.
#[derive(Clone, Debug)]
pub struct Style {
    /// Makes a text of a conversation.
    pub template: ChatTemplate,
    /// What ends an answer besides the model's stop tokens.
    pub stops: &'static [&'static str],
    /// Whether the text is to end where the answer begins; PLATO begins it by itself.
    pub begins: bool,
}

impl Style {
    /// That of a folder: its own template, or the one here of a system that was published without.
    ///
    /// # Errors
    /// [`Error::NoTemplate`] if there is none, or what is wrong with it.
    pub fn of(folder: &Folder, writer: &Writer) -> Result<Self, Error> {
        let plain = |template| Self { template, stops: &[], begins: true };
        if let Folder::Disk(path) = folder
            && let Some(template) = ChatTemplate::from_folder(path)?
        {
            return Ok(plain(template));
        }
        let family = first_config(folder)?;
        let family = family.as_ref().and_then(|config| config.text("model_type"));
        match (System::of(folder)?.name, family) {
            ("glm" | "alm", _) if speaks_chinese(writer) => Ok(plain(ChatTemplate::glm())),
            ("glm" | "alm", _) => Ok(plain(ChatTemplate::glm_english())),
            ("plato", _) => Ok(Self { begins: false, ..plain(ChatTemplate::plato()) }),
            (_, Some("aquila")) => Ok(Self { stops: &["###"], ..plain(ChatTemplate::aquila()) }),
            _ => Err(Error::NoTemplate { folder: folder.path().into() }),
        }
    }
}

fn speaks_chinese(writer: &Writer) -> bool {
    let text = "问题";
    let ids = writer.tokenizer.encode_without_special(text).map(|encoding| encoding.ids).unwrap_or_default();
    ids.len() <= text.chars().count() + 1 && writer.tokenizer.decode(&ids, true).trim() == text
}

/// A conversation.
pub struct Chat<'a> {
    writer: &'a Writer,
    style: Style,
    system: Option<Message>,
    /// The user's and the model's in turn, beginning and ending with the user's while an answer is written.
    turns: Vec<Message>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// What was written.
    pub written: Written,
    /// How many of the oldest turns were left out, for good, to make room.
    pub forgotten: usize,
}

impl<'a> Chat<'a> {
    /// An empty one.
    pub fn new(writer: &'a Writer, style: Style) -> Self {
        Self { writer, style, system: None, turns: Vec::new() }
    }

    /// What the model is to keep in mind from now on; an empty text is nothing.
    pub fn set_system(&mut self, text: &str) {
        self.system = Some(text).filter(|text| !text.is_empty()).map(Message::system);
    }

    /// Forgets all turns, not what is to be kept in mind.
    pub fn reset(&mut self) {
        self.turns.clear();
    }

    /// How many turns are remembered.
    pub fn turns(&self) -> usize {
        self.turns.len()
    }

    /// Answers what the user says. The oldest turns are forgotten, two at a time, where the context has no room for
    /// [`Settings::max_new`] more tokens. Of several texts ([`Settings::count`]) the likeliest per token is the answer. After an error the conversation is what it was before, but for those.
    ///
    /// # Errors
    /// If the template refuses the conversation, what is said does not fit even alone, or no answer can be written.
    pub fn answer(
        &mut self,
        said: &str,
        settings: &Settings,
        watch: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<Answer, Error> {
        let own = self.style.stops.iter().map(|stop| (*stop).to_owned());
        let stop_texts = settings.stop_texts.iter().cloned().chain(own).collect();
        let settings = Settings { stop_texts, ..settings.clone() };
        self.turns.push(Message::user(said));
        let written = self.fitting(settings.max_new).and_then(|(prompt, forgotten)| {
            let mut written = self.writer.write(&[prompt], &settings, watch)?.concat();
            rank(&mut written, &Rank::Mean);
            Ok(Answer { written: written.swap_remove(0), forgotten })
        });
        match &written {
            Ok(answer) => self.turns.push(Message::assistant(answer.written.text.trim())),
            Err(_) => {
                self.turns.pop();
            }
        }
        written
    }

    /// The conversation's tokens, and how many turns had to be forgotten.
    fn fitting(&mut self, max_new: usize) -> Result<(Vec<u32>, usize), Error> {
        let mut forgotten = 0;
        loop {
            let messages: Vec<Message> = self.system.iter().chain(&self.turns).cloned().collect();
            let text = self.style.template.render(&messages, self.style.begins)?;
            let tokens = self.writer.encode_rendered(&text)?;
            let fits = self.writer.generator.room(tokens.len()).is_none_or(|room| max_new <= room);
            if fits || self.turns.len() < 3 {
                return Ok((tokens, forgotten));
            }
            self.turns.drain(..2);
            forgotten += 2;
        }
    }
}
