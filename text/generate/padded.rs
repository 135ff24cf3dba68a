use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use volary_kernels::ops::{Mask, Positions};

/// Prompts of any lengths as one batch: the shorter ones are padded on the left, so that all end, and go on, in the same
/// column. No real token sees the padding, and positions are counted from the first real one.
#[derive(Clone, Debug)]
pub struct LeftPadded {
    ids: Tensor<2, Int>,
    /// How many columns of each row are padding.
    padding: Vec<usize>,
}

impl LeftPadded {
    /// One row per prompt.
    ///
    /// # Panics
    /// If there is no prompt, or one is empty.
    pub fn new(prompts: &[impl AsRef<[u32]>], device: &Device) -> Self {
        let longest = prompts.iter().map(|prompt| prompt.as_ref().len()).max().unwrap_or(0);
        let mut ids = Vec::with_capacity(prompts.len() * longest);
        let mut padding = Vec::with_capacity(prompts.len());
        for prompt in prompts.iter().map(AsRef::as_ref) {
            assert!(!prompt.is_empty(), "an empty prompt");
            padding.push(longest - prompt.len());
            // any token will do: nothing sees it
            ids.extend(std::iter::repeat_n(0, longest - prompt.len()));
            ids.extend(prompt.iter().map(|&id| i64::from(id)));
        }
        let ids = Tensor::from_data(TensorData::new(ids, [prompts.len(), longest]), device);
        Self { ids, padding }
    }

    /// The tokens of all prompts, `[rows, longest]`.
    pub fn ids(&self) -> Tensor<2, Int> {
        self.ids.clone()
    }

    /// Where they are.
    pub fn device(&self) -> Device {
        self.ids.device()
    }

    /// The length of the longest prompt.
    pub fn longest(&self) -> usize {
        self.ids.dims()[1]
    }

    /// How many columns of each row are padding.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }

    /// Where the tokens of `count` columns from `first` on stand in their rows: 0 for the first real one, and for padding.
    pub fn positions(&self, first: usize, count: usize) -> Positions {
        if self.is_even() {
            return Positions::From(first);
        }
        let place = |column: usize, padding: usize| column.saturating_sub(padding) as i64;
        let places: Vec<i64> = self
            .padding
            .iter()
            .flat_map(|&padding| (first..first + count).map(move |column| place(column, padding)))
            .collect();
        let data = TensorData::new(places, [self.padding.len(), count]);
        Positions::Each(Tensor::from_data(data, &self.ids.device()))
    }

    /// What hides the padding among the first `columns` columns.
    pub fn mask(&self, columns: usize) -> Mask {
        if self.is_even() {
            return Mask::Full;
        }
        let rows = self.padding.iter();
        let real: Vec<bool> =
            rows.flat_map(|&padding| (0..columns).map(move |column| column >= padding)).collect();
        let data = TensorData::new(real, [self.padding.len(), columns]);
        Mask::Padding(Tensor::from_data(data, &self.ids.device()))
    }

    /// Row `i` becomes what row `rows[i]` was.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn select(&mut self, rows: &[usize]) {
        self.padding = rows.iter().map(|&row| self.padding[row]).collect();
        self.ids = self.ids.clone().select(0, indices(rows, &self.ids.device()));
    }

    fn is_even(&self) -> bool {
        self.padding.iter().all(|&padding| padding == 0)
    }
}

/// Prompts of any lengths as one batch, for an encoder: the shorter ones are padded on the right.
#[derive(Clone, Debug)]
pub struct RightPadded {
    /// The tokens of all prompts, `[rows, longest]`.
    pub ids: Tensor<2, Int>,
    /// Which of them are no padding; all when `None`.
    pub real: Option<Tensor<2, Bool>>,
}

impl RightPadded {
    /// One row per prompt.
    ///
    /// # Panics
    /// If there is no prompt, or one is empty.
    pub fn new(prompts: &[impl AsRef<[u32]>], device: &Device) -> Self {
        let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.as_ref().len()).collect();
        let longest = lengths.iter().copied().max().expect("there is a prompt");
        assert!(!lengths.contains(&0), "an empty prompt");
        let shape = [prompts.len(), longest];
        let ids: Vec<i64> = prompts
            .iter()
            .flat_map(|prompt| {
                prompt.as_ref().iter().map(|&id| i64::from(id)).chain(std::iter::repeat(0)).take(longest)
            })
            .collect();
        let real: Vec<bool> =
            lengths.iter().flat_map(|&length| (0..longest).map(move |column| column < length)).collect();
        let is_even = lengths.iter().all(|&length| length == longest);
        Self {
            ids: Tensor::from_data(TensorData::new(ids, shape), device),
            real: (!is_even).then(|| Tensor::from_data(TensorData::new(real, shape), device)),
        }
    }
}

/// Row numbers as a tensor, as [`volary_kernels::layers::KvCache::select`] wants them.
pub fn indices(rows: &[usize], device: &Device) -> Tensor<1, Int> {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    Tensor::from_ints(rows.as_slice(), device)
}

/// One token per row, `[rows, 1]`.
pub fn column(tokens: &[u32], device: &Device) -> Tensor<2, Int> {
    let rows = tokens.len();
    let tokens: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
    Tensor::from_data(TensorData::new(tokens, [rows, 1]), device)
}

/// As many tokens of each row, `[rows, new]`.
///
/// # Panics
/// If rows differ in length.
pub fn matrix(tokens: &[Vec<u32>], device: &Device) -> Tensor<2, Int> {
    let new = tokens.first().map_or(0, Vec::len);
    assert!(tokens.iter().all(|row| row.len() == new), "rows of unequal length");
    let data = tokens.iter().flatten().map(|&token| i64::from(token)).collect();
    Tensor::from_data(TensorData::new(data, [tokens.len(), new]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(positions: Positions) -> Vec<i64> {
        match positions {
            Positions::Each(each) => each.into_data().convert::<i64>().iter::<i64>().collect(),
            Positions::From(first) => vec![first as i64],
        }
    }

    fn shown(mask: Mask) -> Vec<bool> {
        match mask {
            Mask::Padding(real) => real.into_data().iter::<bool>().collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn shorter_prompts_are_padded_on_the_left() {
        let mut prompts = LeftPadded::new(&[vec![7, 8, 9], vec![5]], &Device::flex());
        let ids = |prompts: &LeftPadded| {
            prompts.ids().into_data().convert::<i64>().iter::<i64>().collect::<Vec<_>>()
        };
        assert_eq!(ids(&prompts), [7, 8, 9, 0, 0, 5]);
        assert_eq!(places(prompts.positions(0, 3)), [0, 1, 2, 0, 0, 0]);
        assert_eq!(places(prompts.positions(3, 1)), [3, 1]);
        assert_eq!(shown(prompts.mask(4)), [true, true, true, true, false, false, true, true]);

        prompts.select(&[1, 1, 0]);
        assert_eq!(ids(&prompts), [0, 0, 5, 0, 0, 5, 7, 8, 9]);
        assert_eq!(places(prompts.positions(3, 1)), [1, 1, 3]);
    }

    #[test]
    fn an_encoder_has_them_padded_on_the_right() {
        let RightPadded { ids, real } = RightPadded::new(&[vec![7, 8, 9], vec![5]], &Device::flex());
        assert_eq!(ids.into_data().convert::<i64>().iter::<i64>().collect::<Vec<_>>(), [7, 8, 9, 5, 0, 0]);
        let real: Vec<bool> = real.unwrap().into_data().iter::<bool>().collect();
        assert_eq!(real, [true, true, true, true, false, false]);
        assert!(RightPadded::new(&[[7, 8], [5, 6]], &Device::flex()).real.is_none());
    }

    #[test]
    fn prompts_of_one_length_need_no_mask() {
        let prompts = LeftPadded::new(&[[7, 8], [5, 6]], &Device::flex());
        assert!(matches!(prompts.positions(2, 1), Positions::From(2)));
        assert!(matches!(prompts.mask(3), Mask::Full));
    }
}
