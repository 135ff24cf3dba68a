use super::Written;

/// By what candidates are compared; the highest wins.
pub enum Rank<'a> {
    /// Their log-likelihood: short ones win easily.
    Sum,
    /// Their log-likelihood per token, the stop token included (Bao et al. 2021, section 3.2: PLATO-XL draws 20
    /// candidates and keeps the best by likelihood over length).
    Mean,
    /// Anything else.
    By(&'a dyn Fn(&Written) -> f64),
}

/// Sorts candidates of one prompt, the best first; equals stay in their order, and those of no rank (NaN) come last.
///
/// The candidates are drawn by [`super::write`] with a [`super::Settings::count`] of how many are wanted.
pub fn rank(candidates: &mut [Written], by: &Rank) {
    let value = |written: &Written| {
        let value = match by {
            Rank::Sum => written.log_likelihood,
            Rank::Mean => written.mean_log_likelihood(),
            Rank::By(value) => value(written),
        };
        if value.is_nan() { f64::NEG_INFINITY } else { value }
    };
    candidates.sort_by(|a, b| value(b).total_cmp(&value(a)));
}

#[cfg(test)]
mod tests {
    use super::super::Stop;
    use super::*;

    #[test]
    fn candidates_are_ranked_by_sum_mean_or_anything() {
        let written = |tokens: &[u32], stop, log_likelihood| Written {
            tokens: tokens.to_vec(),
            text: String::new(),
            stop,
            log_likelihood,
        };
        let candidates = [
            written(&[1], Stop::Length, -2.0),
            written(&[2, 2], Stop::Token(0), -2.4),  // -0.8 each of 3
            written(&[3, 3, 3], Stop::Length, -2.1), // -0.7
            written(&[4, 4, 4], Stop::Length, f64::NAN),
        ];
        let order = |by: &Rank| {
            let mut candidates = candidates.clone();
            rank(&mut candidates, by);
            candidates.map(|candidate| candidate.tokens[0])
        };
        assert_eq!(order(&Rank::Sum), [1, 3, 2, 4]);
        assert_eq!(order(&Rank::Mean), [3, 2, 1, 4]);
        assert_eq!(order(&Rank::By(&|written| written.tokens.len() as f64)), [3, 4, 2, 1]);
    }
}
