use burn::tensor::Tensor;

use super::GenerateError;

/// Scores of the next token of several rows, on the host: from here on every device gives the same.
pub(super) struct Scores {
    data: Vec<f32>,
    vocab_size: usize,
}

/// Which text a row of scores belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    /// Which of the prompts.
    pub prompt: usize,
    /// How many tokens were written after it.
    pub written: usize,
}

impl Scores {
    /// `[rows, vocab_size]`.
    pub fn read(scores: Tensor<2>, rows: usize) -> Result<Self, GenerateError> {
        let [found, vocab_size] = scores.dims();
        if vocab_size == 0 {
            return Err(GenerateError::EmptyVocabulary);
        }
        if found != rows {
            return Err(GenerateError::Rows { expected: rows, found });
        }
        Ok(Self { data: scores.into_data().convert::<f32>().iter::<f32>().collect(), vocab_size })
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The scores of one row, none of which is NaN or infinite, though they may be minus infinity.
    pub fn row(&self, row: usize, at: At) -> Result<&[f32], GenerateError> {
        let scores = &self.data[row * self.vocab_size..][..self.vocab_size];
        match scores.iter().position(|&score| score.is_nan() || score == f32::INFINITY) {
            Some(token) => Err(at.not_finite(token, scores[token])),
            None => Ok(scores),
        }
    }
}

impl At {
    pub fn not_finite(self, token: usize, score: f32) -> GenerateError {
        let Self { prompt, written } = self;
        GenerateError::NotFinite { prompt, written, token: token as u32, score }
    }

    pub fn no_token(self) -> GenerateError {
        let Self { prompt, written } = self;
        GenerateError::NoToken { prompt, written }
    }
}

/// `ln Σ exp(score)`, by which scores become log-probabilities; minus infinity if all are.
pub(super) fn log_total(scores: &[f32]) -> f64 {
    let best = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if best == f64::NEG_INFINITY {
        return best;
    }
    best + scores.iter().map(|&score| (f64::from(score) - best).exp()).sum::<f64>().ln()
}

/// The likeliest token, if any is allowed; of equals the first.
pub(super) fn likeliest(scores: &[f32]) -> Option<u32> {
    let mut best = (None, f32::NEG_INFINITY);
    for (token, &score) in scores.iter().enumerate() {
        if score > best.1 {
            best = (Some(token as u32), score);
        }
    }
    best.0
}

/// A token by its probability, if any is allowed.
pub(super) fn draw(scores: &[f32], random: &mut fastrand::Rng) -> Option<u32> {
    let best = f64::from(scores[likeliest(scores)? as usize]);
    let weight = |score: f32| (f64::from(score) - best).exp().max(0.0);
    let mut left = random.f64() * scores.iter().map(|&score| weight(score)).sum::<f64>();
    let mut last = None;
    for (token, weight) in scores.iter().map(|&score| weight(score)).enumerate().filter(|(_, w)| *w > 0.0) {
        last = Some(token as u32);
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_of_large_scores() {
        assert_eq!(log_total(&[0.0, 0.0, 0.0, 0.0]), 4f64.ln());
        assert_eq!(log_total(&[1e30, 0.0]), f64::from(1e30f32));
        assert_eq!(log_total(&[f32::NEG_INFINITY; 2]), f64::NEG_INFINITY);
        assert_eq!(log_total(&[]), f64::NEG_INFINITY);
    }

    #[test]
    fn of_equals_the_first_is_likeliest() {
        assert_eq!(likeliest(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(likeliest(&[f32::NEG_INFINITY; 3]), None);
        assert_eq!(likeliest(&[]), None);
    }

    /// 2.0 is e times as likely as 1.0; what is ruled out is never drawn.
    #[test]
    fn draws_follow_the_probabilities() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut counts = [0; 4];
        for _ in 0..20_000 {
            let token = draw(&[f32::NEG_INFINITY, 2.0, 1.0, f32::NEG_INFINITY], &mut random).unwrap();
            counts[token as usize] += 1;
        }
        let share = f64::from(counts[1]) / 20_000.0;
        let e = std::f64::consts::E;
        assert!((share - e / (e + 1.0)).abs() < 0.01, "{share}"); // deviation 0.003
        assert_eq!([counts[0], counts[3]], [0, 0]);
        assert_eq!(draw(&[f32::NEG_INFINITY], &mut random), None);
    }
}
