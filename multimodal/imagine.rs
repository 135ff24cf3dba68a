//! From a text to a picture by latent diffusion: the loop over a text encoder, a model of noise, a sampler and a codec,
//! whichever these are.

use std::ops::ControlFlow;

use burn::tensor::{Device, Int, Tensor, TensorData};
use volary_vision::diffusion::{History, Sampler, Step};

use crate::noise::Philox;

/// Says what a text means to a [`Denoiser`].
pub trait TextEncoder {
    /// The longest text in tokens.
    fn context_length(&self) -> usize;

    /// How many tokens there are.
    fn vocab_size(&self) -> usize;

    /// Token ids `[batch, seq]`, padded at the end, of which so many of each row are real, to `[batch, seq, d_context]`.
    fn encode(&self, ids: Tensor<2, Int>, real: &[usize]) -> Tensor<3>;
}

/// Says what of a noised latent is noise, or what its scheduler takes it to say.
pub trait Denoiser {
    /// The channels that it reads.
    fn channels_in(&self) -> usize;

    /// `sample` `[batch, channels_in, height, width]` and `context` `[batch, seq, d_context]` to
    /// `[batch, channels, height, width]`.
    fn denoise(&self, sample: Tensor<4>, timestep: f64, context: Tensor<3>) -> Tensor<4>;
}

/// Pictures to latents and back. Pictures are `[batch, 3, height, width]`, -1 to 1.
pub trait Codec {
    /// Channels of a latent.
    fn channels(&self) -> usize;

    /// Pixels of a latent's side.
    fn factor(&self) -> usize;

    /// Latents `[batch, channels, height / factor, width / factor]` as a denoiser sees them, drawn with unit noise of their
    /// shape.
    fn encode(&self, pictures: Tensor<4>, noise: Tensor<4>) -> Tensor<4>;

    /// The pictures of latents.
    fn decode(&self, latents: Tensor<4>) -> Tensor<4>;
}

/// What the picture is to show, and how strictly.
#[derive(Clone, Debug)]
pub struct Guidance {
    /// Of the wanted text, `[batch, seq, d_context]`.
    pub context: Tensor<3>,
    /// Of the unwanted one, of the same shape; without it nothing is pushed away.
    pub negative: Option<Tensor<3>>,
    /// How far the answer moves from the unwanted to the wanted one: 1 is the wanted one itself (Ho and Salimans 2022,
    /// <https://arxiv.org/abs/2207.12598>, in the scale that Stable Diffusion uses).
    pub scale: f64,
}

impl Guidance {
    /// The denoiser's guided answer.
    fn answer(&self, denoiser: &dyn Denoiser, sample: Tensor<4>, timestep: f64) -> Tensor<4> {
        let Some(negative) = &self.negative else {
            return denoiser.denoise(sample, timestep, self.context.clone());
        };
        let [batch, ..] = sample.dims();
        let both = Tensor::cat(vec![sample.clone(), sample], 0);
        let context = Tensor::cat(vec![negative.clone(), self.context.clone()], 0);
        let answers = denoiser.denoise(both, timestep, context);
        let [unwanted, wanted] = [0, batch].map(|start| answers.clone().narrow(0, start, batch));
        unwanted.clone() + (wanted - unwanted) * self.scale
    }
}

/// What stays of a picture.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The picture's latents, `[batch, channels, height, width]`.
    pub latents: Tensor<4>,
    /// The noise that is added to them before each step, of the same shape.
    pub noise: Tensor<4>,
    /// 1 where something new is painted, 0 where the picture stays, `[batch, 1, height, width]`.
    pub mask: Tensor<4>,
}

/// One walk from noise to a latent.
pub struct Walk<'a> {
    /// What answers.
    pub denoiser: &'a dyn Denoiser,
    /// How the steps are made.
    pub sampler: &'a dyn Sampler,
    /// What is wanted.
    pub guidance: Guidance,
    /// The first step that is made: later than 0 where a picture is changed.
    pub start: usize,
    /// What the denoiser sees beside the sample: mask and masked picture, `[batch, more, height, width]`.
    pub beside: Option<Tensor<4>>,
    /// What is put back after each step.
    pub kept: Option<Kept>,
}

/// How far a walk is.
#[derive(Clone, Debug)]
pub struct Progress {
    /// How many steps were made.
    pub done: usize,
    /// How many there are.
    pub total: usize,
    /// What the picture's latent is believed to become, `[batch, channels, height, width]`: decode it for a preview.
    pub original: Tensor<4>,
    /// The latent as it is, with its noise.
    pub sample: Tensor<4>,
}

/// The walk was stopped by who watched it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped after {done} of {total} steps")]
pub struct Stopped {
    /// How many steps were made.
    pub done: usize,
    /// How many there were to be.
    pub total: usize,
}

impl Walk<'_> {
    /// From `sample`, with the noise that belongs before the first step, to a latent. `draw` gives unit noise for a step
    /// that draws it. `watch` is told of each step and may stop the walk.
    ///
    /// # Errors
    /// If it was stopped.
    pub fn run(
        &self,
        mut sample: Tensor<4>,
        draw: &mut dyn FnMut(usize) -> Tensor<4>,
        watch: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Tensor<4>, Stopped> {
        let timesteps = self.sampler.timesteps();
        let total = timesteps.len().saturating_sub(self.start);
        let mut history = History::default();
        for at in self.start..timesteps.len() {
            let seen = self.sampler.scaled(at, sample.clone());
            let seen = match &self.beside {
                Some(beside) => Tensor::cat(vec![seen, beside.clone()], 1),
                None => seen,
            };
            let output = self.guidance.answer(self.denoiser, seen, timesteps[at]);
            let noise = self.sampler.draws_noise(at).then(|| draw(at));
            let stepped = self.sampler.step(Step { at, sample, output, noise }, history);
            (sample, history) = (stepped.sample, stepped.history);
            if let Some(Kept { latents, noise, mask }) = &self.kept {
                let old = match at + 1 < timesteps.len() {
                    true => self.sampler.noised(at + 1, latents.clone(), noise.clone()),
                    false => latents.clone(),
                };
                sample = old.clone() + (sample - old) * mask.clone();
            }
            let done = at + 1 - self.start;
            let progress = Progress { done, total, original: stepped.original, sample: sample.clone() };
            if watch(&progress).is_break() {
                return Err(Stopped { done, total });
            }
        }
        Ok(sample)
    }
}

/// What noise is drawn for. Each use has numbers of its own, so that none depends on another having been drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// What a picture begins as.
    Start,
    /// What picks a given picture's latent.
    Picture,
    /// What picks the latent of what is kept of a given picture.
    Masked,
    /// What a step draws.
    Step(usize),
}

/// Unit normal noise of pictures, `[seeds, channels, height, width]`, one seed each: drawn on the host by [`Philox`], the
/// same on every device, and for each picture whatever is drawn beside it.
pub fn noise(seeds: &[u64], [channels, height, width]: [usize; 3], draw: Draw, device: &Device) -> Tensor<4> {
    let stream = match draw {
        Draw::Start => 0,
        Draw::Picture => 1,
        Draw::Masked => 2,
        Draw::Step(at) => 16 + at as u64,
    };
    let size = channels * height * width;
    let values: Vec<f32> = seeds.iter().flat_map(|&seed| Philox::new(seed, stream).normals(size)).collect();
    Tensor::from_data(TensorData::new(values, [seeds.len(), channels, height, width]), device)
}

/// A text's tokens, cut into rows that fit into an encoder's context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Each as long as the context, `[rows, seq]`.
    pub ids: Vec<Vec<u32>>,
    /// How many of each are real.
    pub real: Vec<usize>,
    /// How many tokens did not fit and were left out.
    pub left_out: usize,
}

/// What becomes of a text that is longer than the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Long {
    /// It is cut.
    Cut,
    /// It goes on in at most so many rows, each encoded by itself; the denoiser sees them behind each other.
    Rows(usize),
}

/// The marks that a tokenizer puts around a text, and what pads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Before the text.
    pub before: Vec<u32>,
    /// Behind it.
    pub behind: Vec<u32>,
    /// Up to the context's length.
    pub pad: u32,
}

impl Marks {
    /// A text's tokens in rows of `context_length`.
    ///
    /// # Panics
    /// If the marks leave no room for a token.
    pub fn rows(&self, tokens: &[u32], context_length: usize, long: Long) -> Rows {
        let room = context_length.saturating_sub(self.before.len() + self.behind.len());
        assert!(room > 0, "a context of {context_length} tokens has no room beside the marks");
        let most = match long {
            Long::Cut => 1,
            Long::Rows(most) => most.max(1),
        };
        let chunks: Vec<&[u32]> = match tokens {
            [] => vec![&[]],
            tokens => tokens.chunks(room).take(most).collect(),
        };
        let left_out = tokens.len().saturating_sub(most * room);
        let mut rows = Rows { ids: Vec::new(), real: Vec::new(), left_out };
        for chunk in chunks {
            let mut row = [&self.before, chunk, &self.behind].concat();
            rows.real.push(row.len());
            row.resize(context_length, self.pad);
            rows.ids.push(row);
        }
        rows
    }
}

impl Rows {
    /// With rows of nothing at the end, up to `count`.
    pub fn and_empty(mut self, count: usize, marks: &Marks, context_length: usize) -> Self {
        while self.ids.len() < count {
            let empty = marks.rows(&[], context_length, Long::Cut);
            self.ids.extend(empty.ids);
            self.real.extend(empty.real);
        }
        self
    }

    /// What they mean, behind each other: `[1, rows * seq, d_context]`.
    pub fn encode(&self, encoder: &dyn TextEncoder, device: &Device) -> Tensor<3> {
        let seq = self.ids.first().map_or(0, Vec::len);
        let flat: Vec<i64> = self.ids.iter().flatten().map(|id| i64::from(*id)).collect();
        let ids = Tensor::from_data(TensorData::new(flat, [self.ids.len(), seq]), device);
        let context = encoder.encode(ids, &self.real); // [rows, seq, d_context]
        let [rows, seq, d_context] = context.dims();
        context.reshape([1, rows * seq, d_context])
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;
    use volary_vision::diffusion::{Last, Method, NoiseScheduler, Scheduler};

    use super::*;

    /// Answers with the mean of what it is told.
    struct Told;

    impl Denoiser for Told {
        fn channels_in(&self) -> usize {
            2
        }

        fn denoise(&self, sample: Tensor<4>, _timestep: f64, context: Tensor<3>) -> Tensor<4> {
            let [batch, ..] = sample.dims();
            let told: Tensor<4> = context.mean_dim(2).mean_dim(1).reshape([batch, 1, 1, 1]);
            sample.zeros_like() + told
        }
    }

    fn context(value: f64) -> Tensor<3> {
        Tensor::ones([1, 2, 3], &Device::flex()) * value
    }

    fn sampler(steps: usize) -> Box<dyn Sampler> {
        let method = Method::Ddim { last: Last::Clean, eta: 0.0 };
        Scheduler::Noise(NoiseScheduler { method, ..NoiseScheduler::default() }).sampler(steps).unwrap()
    }

    fn unwatched(_: &Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn close(found: Tensor<4>, expected: Tensor<4>) {
        found.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-4));
    }

    #[test]
    fn guidance_goes_past_what_is_wanted() {
        let sample = Tensor::<4>::zeros([1, 2, 1, 1], &Device::flex());
        let answer = |scale| {
            let guidance = Guidance { context: context(3.0), negative: Some(context(1.0)), scale };
            guidance.answer(&Told, sample.clone(), 0.0).max().into_scalar::<f32>()
        };
        assert_eq!([answer(0.0), answer(1.0), answer(7.5)], [1.0, 3.0, 16.0]);
    }

    #[test]
    fn what_is_masked_out_stays_and_the_rest_is_new() {
        let (device, sampler) = (Device::flex(), sampler(5));
        let latents = noise(&[1], [2, 4, 4], Draw::Picture, &device);
        let start = noise(&[1], [2, 4, 4], Draw::Start, &device);
        let mask =
            Tensor::<4>::zeros([1, 1, 4, 4], &device).slice_fill(burn::tensor::s![.., .., 0..2, ..], 1.0);
        let walk = |kept| Walk {
            denoiser: &Told,
            sampler: sampler.as_ref(),
            guidance: Guidance { context: context(0.3), negative: None, scale: 1.0 },
            start: 0,
            beside: None,
            kept,
        };
        let kept = Kept { latents: latents.clone(), noise: start.clone(), mask };
        let mut draw = |_| -> Tensor<4> { panic!("DDIM draws nothing") };
        let painted = walk(Some(kept)).run(start.clone(), &mut draw, &mut unwatched).unwrap();
        let free = walk(None).run(start, &mut draw, &mut unwatched).unwrap();
        close(painted.clone().narrow(2, 2, 2), latents.narrow(2, 2, 2));
        // this denoiser looks at nothing around a place
        close(painted.narrow(2, 0, 2), free.narrow(2, 0, 2));
    }

    #[test]
    fn who_watches_may_stop() {
        let sampler = sampler(6);
        let walk = Walk {
            denoiser: &Told,
            sampler: sampler.as_ref(),
            guidance: Guidance { context: context(0.0), negative: None, scale: 1.0 },
            start: 2,
            beside: None,
            kept: None,
        };
        let mut seen = Vec::new();
        let mut watch = |progress: &Progress| {
            seen.push((progress.done, progress.total));
            if progress.done == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let start = Tensor::zeros([1, 2, 2, 2], &Device::flex());
        let stopped = walk.run(start, &mut |_| unreachable!(), &mut watch).unwrap_err();
        assert_eq!(stopped, Stopped { done: 3, total: 4 });
        assert_eq!(seen, [(1, 4), (2, 4), (3, 4)]);
    }

    #[test]
    fn a_long_text_goes_on_in_more_rows() {
        let marks = Marks { before: vec![1], behind: vec![2], pad: 0 };
        let tokens = [11, 12, 13, 14, 15];
        let rows = marks.rows(&tokens, 4, Long::Rows(9));
        assert_eq!(rows.ids, [[1, 11, 12, 2], [1, 13, 14, 2], [1, 15, 2, 0]]);
        assert_eq!((rows.real, rows.left_out), (vec![4, 4, 3], 0));
        let cut = marks.rows(&tokens, 4, Long::Cut);
        assert_eq!((cut.ids.len(), cut.left_out), (1, 3));
        assert_eq!(marks.rows(&tokens, 4, Long::Rows(2)).left_out, 1);
        let empty = marks.rows(&[], 4, Long::Cut).and_empty(2, &marks, 4);
        assert_eq!(empty.ids, [[1, 2, 0, 0], [1, 2, 0, 0]]);
    }

    #[test]
    fn a_pictures_noise_is_its_own() {
        let device = Device::flex();
        let of = |seeds: &[u64], draw| noise(seeds, [2, 3, 5], draw, &device).into_data();
        let both = noise(&[7, 8], [2, 3, 5], Draw::Start, &device);
        assert_eq!(both.clone().narrow(0, 1, 1).into_data(), of(&[8], Draw::Start));
        assert_ne!(of(&[8], Draw::Start), of(&[8], Draw::Step(0)));
        assert_ne!(of(&[8], Draw::Step(1)), of(&[8], Draw::Step(0)));
    }
}
