//! Whose tokenizer it is: which rules hold where a folder's files are silent.

use super::config::Role;

/// A family of tokenizers: how its vocabulary files are read, and which marks stand around a text.
///
/// A folder says it by `tokenizer_class`, by `model_type`, or by the names of its files
/// ([`Tokenizer::from_folder`](super::Tokenizer::from_folder)); a program that knows better says it itself
/// ([`Tokenizer::from_folder_as`](super::Tokenizer::from_folder_as)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TokenizerKind {
    /// WordPiece, `[CLS] a [SEP] b [SEP]`: BERT, ERNIE, PLUG, ConSERT.
    Bert,
    /// CLIP's bytes with word ends.
    Clip,
    /// Byte-level BPE without marks: GPT-2, GPT-3, Aquila.
    Gpt2,
    /// Byte-level BPE, `<s> a </s></s> b </s>`.
    Roberta,
    /// SentencePiece, `a </s> b </s>`, and the sentinels `<extra_id_0>`, ... after the last piece: T5, mT5.
    T5,
    /// SentencePiece with fairseq's ids (`<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, every other piece one up,
    /// `<mask>` last), `<s> a </s></s> b </s>`.
    XlmRoberta,
    /// SentencePiece, `<s> a`: LLaMA.
    Llama,
    /// SentencePiece as it is, without marks: ALM, and whatever no name is known for.
    SentencePiece,
    /// CPM-1: words as jieba cuts them, spaces and line ends as `▂` and `▃`, SentencePiece; `a <sep> <cls>`.
    ///
    /// As transformers' `CpmTokenizer`: compatibility forms and accents are taken apart first, and a comma
    /// after a digit is a piece of its own. Words are cut as they were for training (with the model of
    /// unknown words, which transformers 5 leaves out and 4 had).
    Cpm,
    /// PanGu-alpha: like CPM-1 without marks and without a change to characters.
    PanguAlpha,
    /// CPM-2 and Yuan 1.0: words as jieba cuts them, then the longest pieces of `vocab.txt`.
    ///
    /// Where the vocabulary has pieces that begin with `##`, those go on a word that is not Chinese, and
    /// the space between two such words is left out (decoding puts it back). Where it has none,
    /// full-width characters become half-width, but for `，。！（）？、；：`.
    Cpm2,
    /// PLATO: SentencePiece whose pieces have their ids in a `vocab.txt`, `[CLS] a [SEP] b [SEP]`.
    Plato,
    /// GLM base to 515M: BERT's WordPiece with GLM's command tokens.
    GlmBert,
    /// GLM RoBERTa: RoBERTa's BPE with GLM's command tokens.
    GlmRoberta,
    /// GLM 2B and 10B: GPT-2's BPE with GLM's command tokens, `[CLS] a <|endoftext|>`.
    GlmGpt2,
    /// Chinese GLM: SentencePiece, then `<|endoftext|> [SEP] [CLS] [MASK] [UNK]`, one unused id,
    /// `<|startofpiece|> <|endofpiece|> [sMASK] [gMASK]`; `[CLS] a <|endoftext|>`.
    GlmChinese,
    /// Chinese GLM with `fix_command_token` off, as FlagAI's examples load GLM-large-ch: `[gMASK]` has the
    /// id of `<|endofpiece|>`, and `[sMASK]` the next one.
    GlmChineseUnfixed,
    /// GLM-130B (icetk): 20 000 ids of image codes, the text pieces, then command tokens, tab and runs of
    /// 2 to 80 spaces, and the bytes. Text only: image codes are named `<image_0>`, ... and never made
    /// from pictures here.
    Glm130b,
    /// Whatever `tokenizer.json` says.
    Library,
}

impl TokenizerKind {
    /// The kind that a `tokenizer_class`, or a model's `model_type`, means.
    pub fn of_name(name: &str) -> TokenizerKind {
        let name = name.strip_suffix("Fast").unwrap_or(name);
        match name {
            "BertTokenizer" | "ErnieTokenizer" | "bert" | "chinese_clip" | "ernie" | "plug" => {
                TokenizerKind::Bert
            }
            "CLIPTokenizer" | "clip" | "clip_text_model" => TokenizerKind::Clip,
            "GPT2Tokenizer" | "AquilaTokenizer" | "gpt2" | "aquila" => TokenizerKind::Gpt2,
            "RobertaTokenizer" | "roberta" => TokenizerKind::Roberta,
            "T5Tokenizer" | "MT5Tokenizer" | "t5" | "mt5" | "umt5" => TokenizerKind::T5,
            "XLMRobertaTokenizer" | "xlm-roberta" | "altclip" => TokenizerKind::XlmRoberta,
            "LlamaTokenizer" | "llama" => TokenizerKind::Llama,
            "CpmTokenizer" => TokenizerKind::Cpm,
            "PanguAlphaTokenizer" | "GPTPanguTokenizer" | "gpt_pangu" => TokenizerKind::PanguAlpha,
            "EncDecTokenizer" | "CPM2Tokenizer" => TokenizerKind::Cpm2,
            "UnifiedTransformerTokenizer" => TokenizerKind::Plato,
            "GLMBertTokenizer" => TokenizerKind::GlmBert,
            "GLMRobertaTokenizer" => TokenizerKind::GlmRoberta,
            "GLMGPT2Tokenizer" => TokenizerKind::GlmGpt2,
            "GLMChineseTokenizer" => TokenizerKind::GlmChinese,
            "icetk-glm-130B" | "GLM130BTokenizer" => TokenizerKind::Glm130b,
            _ => TokenizerKind::Library,
        }
    }

    /// Whose word pieces a `vocab.txt` alone holds.
    pub(super) fn of_words<'a>(mut tokens: impl Iterator<Item = &'a str>) -> TokenizerKind {
        match tokens.any(|token| token == "<eod>") {
            true => TokenizerKind::Cpm2,
            false => TokenizerKind::Bert,
        }
    }

    /// Whose SentencePiece model a file of this name is, where nothing else says it.
    pub(super) fn of_model_file(name: &str) -> TokenizerKind {
        match name {
            "cog-pretrain.model" => TokenizerKind::GlmChinese,
            "ice_text.model" => TokenizerKind::Glm130b,
            "chinese_vocab.model" => TokenizerKind::Cpm,
            _ => TokenizerKind::SentencePiece,
        }
    }

    /// The command tokens that follow the vocabulary of a GLM built on another tokenizer.
    pub(super) fn commands(self) -> &'static [&'static str] {
        match self {
            TokenizerKind::GlmBert | TokenizerKind::GlmRoberta => &["<|startofpiece|>", "<|endofpiece|>"],
            TokenizerKind::GlmGpt2 => &[
                "<|startofpiece|>",
                "<|endofpiece|>",
                "[CLS]",
                "[MASK]",
                "[SEP]",
                "[UNK]",
                "[gMASK]",
                "[sMASK]",
            ],
            _ => &[],
        }
    }

    /// The spellings to try for a role, first the likeliest.
    pub(super) fn spellings(self, role: Role) -> &'static [&'static str] {
        use TokenizerKind as Kind;
        match (self, role) {
            (Kind::Bert | Kind::Plato | Kind::GlmBert, Role::Unk) => &["[UNK]"],
            (Kind::Bert | Kind::Plato | Kind::GlmBert, Role::Sep) => &["[SEP]"],
            (Kind::Bert | Kind::Plato | Kind::GlmBert, Role::Pad) => &["[PAD]"],
            (Kind::Bert | Kind::Plato | Kind::GlmBert, Role::Cls) => &["[CLS]"],
            (Kind::Bert | Kind::Plato | Kind::GlmBert, Role::Mask) => &["[MASK]"],
            (Kind::GlmBert, Role::Eos) => &["[PAD]"],
            (Kind::Clip, Role::Bos) => &["<|startoftext|>"],
            (Kind::Clip, Role::Eos | Role::Unk | Role::Pad) => &["<|endoftext|>"],
            (Kind::Gpt2, Role::Bos | Role::Eos | Role::Unk) => &["<|endoftext|>"],
            (Kind::GlmGpt2 | Kind::GlmChinese | Kind::GlmChineseUnfixed, role) => match role {
                Role::Eos | Role::Pad => &["<|endoftext|>"],
                Role::Cls => &["[CLS]"],
                Role::Sep => &["[SEP]"],
                Role::Mask => &["[MASK]"],
                Role::Unk => &["[UNK]"],
                Role::Bos => &[],
            },
            (Kind::Roberta | Kind::GlmRoberta | Kind::XlmRoberta, role) => match role {
                Role::Bos | Role::Cls => &["<s>"],
                Role::Eos | Role::Sep => &["</s>"],
                Role::Unk => &["<unk>"],
                Role::Pad => &["<pad>"],
                Role::Mask => &["<mask>"],
            },
            (Kind::Glm130b, role) => match role {
                Role::Bos => &["<sop>"],
                Role::Eos => &["</s>"],
                Role::Unk => &["<unk>"],
                Role::Mask => &["[MASK]"],
                Role::Pad | Role::Sep | Role::Cls => &[],
            },
            (Kind::T5, Role::Eos) => &["</s>"],
            (Kind::T5, Role::Unk) => &["<unk>"],
            (Kind::T5, Role::Pad) => &["<pad>"],
            (Kind::Cpm, Role::Sep) => &["<sep>"],
            (Kind::Cpm, Role::Cls) => &["<cls>"],
            (Kind::Cpm2, Role::Eos) => &["<eod>"],
            (Kind::Bert | Kind::Plato | Kind::GlmBert | Kind::Clip | Kind::Gpt2 | Kind::T5, _) => &[],
            (_, Role::Bos) => &["<s>", "<|startoftext|>"],
            (_, Role::Eos) => &["</s>", "<|endoftext|>"],
            (_, Role::Unk) => &["<unk>", "[UNK]"],
            (_, Role::Sep) => &["[SEP]"],
            (_, Role::Pad) => &["<pad>", "[PAD]"],
            (_, Role::Cls) => &["[CLS]"],
            (_, Role::Mask) => &["<mask>", "[MASK]"],
        }
    }
}
