/// Why a text could not be written.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// Settings that mean nothing, or that the vocabulary cannot meet; everything wrong with them.
    #[error("{}", problems.join("; "))]
    Settings {
        /// One sentence each.
        problems: Vec<String>,
    },
    /// The model scores no token at all.
    #[error("the vocabulary is empty")]
    EmptyVocabulary,
    /// The session's rows are not those that it was asked for.
    #[error("the model gave scores of {found} rows, expected {expected}")]
    Rows {
        /// How many were asked for.
        expected: usize,
        /// How many there were.
        found: usize,
    },
    /// The model is broken, or its numbers overflow.
    #[error("prompt {prompt}: after {written} new tokens the model scores token {token} as {score}")]
    NotFinite {
        /// Which of the prompts.
        prompt: usize,
        /// How many tokens were written after it.
        written: usize,
        /// The first such token.
        token: u32,
        /// NaN, or infinity.
        score: f32,
    },
    /// The settings, or the model, rule out every token.
    #[error("prompt {prompt}: after {written} new tokens no token is allowed")]
    NoToken {
        /// Which of the prompts.
        prompt: usize,
        /// How many tokens were written after it.
        written: usize,
    },
}
