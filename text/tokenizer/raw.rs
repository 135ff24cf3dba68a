//! Tokenizers from a SentencePiece `.model`, and from CPM-2's `vocab.txt`.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, PostProcessorWrapper};

use super::chinese::{Cleaning, WordPieces};
use super::config::{Config, Role};
use super::engine::{Decoder, Engine, Model, Normalizer, Prefix, Step};
use super::files::{Place, command, spelled, template};
use super::proto::{Piece, PieceKind, Proto};
use super::sentencepiece::{Layout, SentencePiece};
use super::{TokenizerError, TokenizerKind, guard, icetk};

/// T5 has as many sentinels unless its configuration says otherwise.
const T5_SENTINELS: usize = 100;

/// The pipeline of a `.model`; `vocab` is the text of PLATO's `vocab.txt`.
pub(super) fn sentencepiece(
    file: &Path,
    bytes: &[u8],
    vocab: Option<Vec<String>>,
    kind: TokenizerKind,
    config: &Config,
) -> Result<Engine, TokenizerError> {
    use TokenizerKind as Kind;
    let mut proto = Proto::read(file, bytes)?;
    let layout = match (kind, vocab) {
        (Kind::Glm130b, _) => icetk::extend(&mut proto),
        (Kind::XlmRoberta, _) => fairseq(file, &proto.pieces)?,
        (Kind::Plato, Some(vocab)) => by_vocabulary(file, &proto.pieces, vocab)?,
        (Kind::T5, _) => {
            let sentinels = (0..config.extra_ids.unwrap_or(T5_SENTINELS)).rev();
            Layout::in_order(&proto.pieces, sentinels.map(|i| format!("<extra_id_{i}>")))
        }
        (Kind::GlmChinese | Kind::GlmChineseUnfixed, _) => glm_chinese(&proto.pieces, kind),
        _ => Layout::in_order(&proto.pieces, []),
    };
    // What stands for no text: control pieces, and tokens that are no pieces.
    let pieces: HashSet<&str> = proto.pieces.iter().map(|piece| piece.text.as_str()).collect();
    let special = |piece: &&Piece| matches!(piece.kind, PieceKind::Control | PieceKind::Unknown);
    let special = proto.pieces.iter().filter(special).map(|piece| &piece.text);
    let names = |token: &&String| !is_gap(token) && !pieces.contains(token.as_str());
    let codes = if kind == Kind::Glm130b { icetk::IMAGE_CODES as usize } else { 0 };
    let special: Vec<AddedToken> = special
        .chain(layout.tokens.iter().skip(codes).filter(names))
        .chain(layout.aliases.iter().map(|(token, _)| token))
        .map(|token| command(token).normalized(false))
        .collect();

    let model = Arc::new(SentencePiece::new(file, proto, layout)?);
    let prefix = match (kind, config.legacy) {
        (Kind::Llama, Some(false)) => Prefix::First,
        _ => Prefix::Always,
    };
    let pieces = Step::SentencePiece(model.clone(), prefix);
    let steps = match kind {
        Kind::Cpm => vec![Step::Words, Step::CpmCleaning(cleaning(config)), pieces],
        Kind::PanguAlpha => vec![Step::Words, pieces],
        Kind::Plato => vec![Step::PlatoCleaning, pieces],
        Kind::Glm130b => vec![Step::IceSpaces, pieces],
        _ => vec![pieces],
    };
    let decoder = match kind {
        Kind::Cpm | Kind::PanguAlpha => Decoder::Blocks(Box::new(Decoder::SentencePiece(model.clone()))),
        Kind::Glm130b => Decoder::IceSpaces(model.clone()),
        // transformers keeps a space that stands before what is left out.
        Kind::T5 | Kind::XlmRoberta => {
            Decoder::Library(Metaspace::new('\u{2581}', PrependScheme::Always, true).into())
        }
        _ => Decoder::SentencePiece(model.clone()),
    };
    let mut engine = Engine::new(match kind {
        Kind::Cpm => Model::Cpm(model),
        _ => Model::SentencePiece(model),
    });
    guard(file, || engine.with_normalizer(Some(Normalizer(steps))).map(|_| ()))?;
    engine.with_decoder(Some(decoder));
    guard(file, || engine.add_tokens(special))?;
    // How the configuration spells a token's options counts.
    let named = config.named.iter().map(|(_, token)| token).chain(&config.extra);
    let known = named.filter(|token| engine.token_to_id(&token.content).is_some()).cloned();
    let known: Vec<AddedToken> = known.collect();
    guard(file, || engine.add_tokens(known))?;
    marks(file, &mut engine, kind, config)?;
    Ok(engine)
}

/// The pipeline of CPM-2's and Yuan's `vocab.txt`.
pub(super) fn word_pieces(file: &Path, tokens: Vec<String>) -> Result<Engine, TokenizerError> {
    let sentinel = |token: &&String| {
        let number = token.strip_prefix("<s_").and_then(|rest| rest.strip_suffix('>'));
        number.is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit()))
            || ["<unk>", "<pad>", "<eod>"].contains(&token.as_str())
    };
    let special: Vec<AddedToken> =
        tokens.iter().filter(sentinel).map(|token| AddedToken::from(token, true)).collect();
    let lacks = || TokenizerError::UnknownToken {
        file: file.into(),
        field: "unk_token".into(),
        token: "<unk>".into(),
    };
    let pieces = Arc::new(WordPieces::new(tokens).ok_or_else(lacks)?);
    let mut engine = Engine::new(Model::WordPieces(pieces.clone()));
    engine.with_decoder(Some(Decoder::WordPieces(pieces)));
    guard(file, || engine.add_tokens(special))?;
    Ok(engine)
}

/// Puts jieba before a pipeline that a `tokenizer.json` describes, as Python does outside of it.
pub(super) fn cut_words_first(engine: &mut Engine) -> tokenizers::Result<()> {
    let steps = engine.get_normalizer().map_or(Vec::new(), |normalizer| normalizer.0.clone());
    let steps = [vec![Step::Words], steps].concat();
    engine.with_normalizer(Some(Normalizer(steps)))?;
    if let Some(decoder) = engine.get_decoder().cloned() {
        engine.with_decoder(Some(Decoder::Blocks(Box::new(decoder))));
    }
    Ok(())
}

fn cleaning(config: &Config) -> Cleaning {
    Cleaning {
        remove_space: config.remove_space.unwrap_or(true),
        keep_accents: config.keep_accents,
        lower_case: config.lower_case.unwrap_or(false),
    }
}

/// fairseq begins with its own four tokens, and every piece of text moves up by one.
fn fairseq(file: &Path, pieces: &[Piece]) -> Result<Layout, TokenizerError> {
    const FIRST: [&str; 4] = ["<s>", "<pad>", "</s>", "<unk>"];
    let begin: Vec<&str> = pieces.iter().take(3).map(|piece| piece.text.as_str()).collect();
    if let Some(lacking) = ["<unk>", "<s>", "</s>"].iter().find(|token| !begin.contains(*token)) {
        return Err(TokenizerError::UnknownToken {
            file: file.into(),
            field: "one of its first three pieces".into(),
            token: (*lacking).into(),
        });
    }
    let place = |i: usize, piece: &Piece| match FIRST.iter().position(|token| *token == piece.text) {
        Some(id) if i < 3 => id as u32,
        _ => i as u32 + 1,
    };
    let text = pieces.iter().skip(3).map(|piece| piece.text.clone());
    Ok(Layout {
        tokens: FIRST.map(String::from).into_iter().chain(text).chain(["<mask>".to_owned()]).collect(),
        ids: pieces.iter().enumerate().map(|(i, piece)| place(i, piece)).collect(),
        aliases: Vec::new(),
    })
}

/// PLATO: `vocab.txt` numbers the tokens, pieces that it lacks are unknown.
fn by_vocabulary(file: &Path, pieces: &[Piece], vocab: Vec<String>) -> Result<Layout, TokenizerError> {
    let tokens = vocab;
    let ids: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
    let unknown = ids.get("[UNK]").or_else(|| ids.get("<unk>")).copied();
    let unknown = unknown.ok_or_else(|| TokenizerError::UnknownToken {
        file: file.with_file_name("vocab.txt"),
        field: "unk_token".into(),
        token: "[UNK]".into(),
    })?;
    let ids = pieces.iter().map(|piece| ids.get(piece.text.as_str()).copied().unwrap_or(unknown)).collect();
    Ok(Layout { tokens, ids, aliases: Vec::new() })
}

/// GLM's commands after the pieces. Without the fix the masks begin at the id of `<|endofpiece|>`.
fn glm_chinese(pieces: &[Piece], kind: TokenizerKind) -> Layout {
    const END: &str = "<|endofpiece|>";
    let commands =
        ["<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", "[UNUSED1]", "<|startofpiece|>", END];
    let masks: &[&str] = match kind {
        TokenizerKind::GlmChineseUnfixed => &["[sMASK]"],
        _ => &["[sMASK]", "[gMASK]"],
    };
    let mut layout = Layout::in_order(pieces, commands.iter().chain(masks).map(|token| (*token).to_owned()));
    if kind == TokenizerKind::GlmChineseUnfixed {
        let end = (pieces.len() + commands.len() - 1) as u32;
        layout.aliases.push(("[gMASK]".to_owned(), end));
    }
    layout
}

/// An id that no token of the text has.
fn is_gap(token: &str) -> bool {
    token == "[UNUSED1]"
}

/// The marks around a text, as each kind's Python class puts them.
fn marks(
    file: &Path,
    engine: &mut Engine,
    kind: TokenizerKind,
    config: &Config,
) -> Result<(), TokenizerError> {
    use Place::{First, Mark, Second};
    let [bos, eos, sep, cls] =
        [Role::Bos, Role::Eos, Role::Sep, Role::Cls].map(|role| spelled(config, kind, role));
    let (single, pair) = match kind {
        TokenizerKind::T5 => {
            let eos = Mark(&eos, 0);
            (vec![First, eos], vec![First, eos, Second(0), eos])
        }
        TokenizerKind::XlmRoberta => {
            let (cls, sep) = (Mark(&cls, 0), Mark(&sep, 0));
            (vec![cls, First, sep], vec![cls, First, sep, sep, Second(0), sep])
        }
        TokenizerKind::Cpm => (
            vec![First, Mark(&sep, 0), Mark(&cls, 2)],
            vec![First, Mark(&sep, 0), Second(1), Mark(&sep, 1), Mark(&cls, 2)],
        ),
        TokenizerKind::Plato => {
            let (cls, end) = (Mark(&cls, 0), Mark(&sep, 0));
            (vec![cls, First, end], vec![cls, First, end, Second(1), Mark(&sep, 1)])
        }
        TokenizerKind::GlmChinese | TokenizerKind::GlmChineseUnfixed => {
            let (cls, end) = (Mark(&cls, 0), Mark(&eos, 0));
            (vec![cls, First, end], vec![cls, First, end, Second(0), end])
        }
        TokenizerKind::PanguAlpha | TokenizerKind::Glm130b => return Ok(()),
        _ => {
            let wanted = |add: bool, token| add.then_some(token);
            let add_bos = config.add_bos.unwrap_or(kind == TokenizerKind::Llama);
            let around = |text, type_id| {
                let before = wanted(add_bos, Mark(&bos, type_id)).into_iter().chain([text]);
                before.chain(wanted(config.add_eos.unwrap_or(false), Mark(&eos, type_id)))
            };
            (around(First, 0).collect(), around(First, 0).chain(around(Second(1), 1)).collect())
        }
    };
    // A vocabulary may lack a mark: it is left out then, as it has no embedding.
    let known = |place: &Place| match place {
        Mark(token, _) => engine.token_to_id(token).is_some(),
        _ => true,
    };
    let [single, pair] = [single, pair].map(|places| places.into_iter().filter(known).collect::<Vec<_>>());
    let processor = template(&single, &pair, |token| engine.token_to_id(token).map(u64::from));
    let processor = guard(file, || Ok(serde_json::from_value::<PostProcessorWrapper>(processor)?))?;
    engine.with_post_processor(Some(processor));
    Ok(())
}
