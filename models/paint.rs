//! Asking with pictures: examples whose answers are given stand above a picture whose answer is to be painted. What
//! [`mod@crate::painter`] and [`mod@crate::seggpt`] have in common besides the network.

use burn::tensor::{Device, Tensor};
use volary_vision::image::{Background, Rgb8};
use volary_vision::interpolation::Interpolation;
use volary_vision::palette::Painting;
use volary_vision::preprocess::{Convert, Normalize, Pixels, Preprocessor, Rescale, Resize, stack};
use volary_vision::resample::Filter;

use crate::error::Error;
use crate::painter::{MEAN, STD};

/// A picture and its answer: a depth map of it, a segmentation, the same picture without rain.
#[derive(Clone, Debug)]
pub struct Example {
    /// The picture.
    pub picture: Rgb8,
    /// As large.
    pub answer: Rgb8,
}

/// What keeps these examples from being shown to a model.
pub(crate) fn misfits(examples: &[Example]) -> Vec<String> {
    if examples.is_empty() {
        return vec!["there is no example".to_owned()];
    }
    let misfit = |(number, Example { picture, answer }): (usize, &Example)| {
        let [[width, height], [w, h]] = [picture, answer].map(|picture| [picture.width(), picture.height()]);
        let fits = [width, height] == [w, h];
        (!fits).then(|| format!("example {number}: the picture is {width}x{height}, its answer {w}x{h}"))
    };
    (1..).zip(examples).filter_map(misfit).collect()
}

/// What makes tensors of pictures and a picture of what is painted.
#[derive(Clone, Debug)]
pub struct Easel {
    /// For pictures. It makes them as large as the model sees one.
    pub preprocessor: Preprocessor,
    /// What answers are resized with.
    pub filter: Filter,
}

impl Easel {
    /// What the authors' scripts for Painter and SegGPT do, of which their folders say nothing: pictures of `[height,
    /// width]`, normalised as ImageNet's.
    pub fn of_authors(size: [usize; 2], filter: Filter) -> Self {
        let preprocessor = Preprocessor {
            convert: Convert::First(Background::DropAlpha),
            resize: Resize::Exact(size),
            filter: Filter::Bicubic,
            crop: None,
            rescale: Rescale::Over255,
            normalize: Some(Normalize { mean: MEAN.map(|x| x as f32), std: STD.map(|x| x as f32) }),
        };
        Self { preprocessor, filter }
    }

    /// Pictures, and their answers: `[pictures, 3, height, width]` each.
    ///
    /// # Errors
    /// If there is none.
    pub fn examples<'a>(
        &self,
        examples: impl IntoIterator<Item = &'a Example>,
        device: &Device,
    ) -> Result<[Tensor<4>; 2], Error> {
        let of_answers = Preprocessor { filter: self.filter, ..self.preprocessor.clone() };
        let (mut pictures, mut answers) = (Vec::new(), Vec::new());
        for Example { picture, answer } in examples {
            pictures.push(self.preprocessor.apply(picture)?);
            answers.push(of_answers.apply(answer)?);
        }
        Ok([stack(&pictures, device)?, stack(&answers, device)?])
    }

    /// One question with every example above it: pictures and answers, `[examples, 3, 2 * height, width]` each. What is to
    /// be painted must be masked; the examples' answers stand there.
    ///
    /// # Errors
    /// If there is no example, or an answer is not as large as its picture.
    pub fn question(
        &self,
        asked: &Rgb8,
        examples: &[Example],
        device: &Device,
    ) -> Result<[Tensor<4>; 2], Error> {
        let problems = misfits(examples);
        if !problems.is_empty() {
            return Err(Error::Prompt { problems });
        }
        let [above, answers] = self.examples(examples, device)?;
        let asked = self.preprocessor.batch(std::slice::from_ref(asked), device)?.expand(above.dims());
        Ok([Tensor::cat(vec![above, asked], 2), Tensor::cat(vec![answers.clone(), answers], 2)])
    }

    /// The lower half of the first picture that a model painted, `[rows, 3, 2 * height, width]`, as large as what was
    /// asked about.
    pub fn answer(&self, painted: Tensor<4>, asked: &Rgb8, interpolation: Interpolation) -> Painting {
        let [_, channels, both, width] = painted.dims();
        let height = both / 2;
        let answer = painted.narrow(0, 0, 1).narrow(2, height, height);
        let data = answer.into_data().convert::<f32>().iter::<f32>().collect();
        let painting = Painting::new(&Pixels { data, channels, height, width }, self.preprocessor.normalize);
        painting.resized([asked.height(), asked.width()], interpolation)
    }
}
