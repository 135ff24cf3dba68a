//! Drawn pictures. For in-context segmentation: two shapes of different colours on a ground, one of which is meant. What is
//! meant is its colour; where it stands, how large it is and which shape it has change from picture to picture. And single
//! shapes on no ground.

use std::ops::Range;

use fastrand::Rng;
use volary_vision::image::Rgb8;

use crate::error::Error;
use crate::paint::Example;

/// Side of a drawn picture in pixels.
pub const SIDE: usize = 32;

/// The outline of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are called what they are")]
pub enum Form {
    Disc,
    Square,
    Triangle,
    Diamond,
    Cross,
    HalfDisc,
}

impl Form {
    const LEARNED: [Self; 3] = [Self::Disc, Self::Square, Self::Triangle];
    const UNSEEN: [Self; 3] = [Self::Diamond, Self::Cross, Self::HalfDisc];

    /// Whether a point is inside, of which both parts are from -1 to 1, downwards and to the right.
    fn holds(self, [down, right]: [f32; 2]) -> bool {
        match self {
            Self::Disc => down * down + right * right <= 1.0,
            Self::Square => down.abs().max(right.abs()) <= 0.8,
            Self::Triangle => down <= 0.8 && right.abs() <= 0.55 * (down + 1.0),
            Self::Diamond => down.abs() + right.abs() <= 1.0,
            Self::Cross => down.abs().max(right.abs()) <= 1.0 && down.abs().min(right.abs()) <= 0.4,
            Self::HalfDisc => down <= 0.3 && down * down + right * right <= 1.0,
        }
    }
}

/// Which shapes and colours are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Those that are trained on.
    Learned,
    /// Those that are not: shapes, and hues for what is meant.
    Unseen,
}

impl Part {
    fn form(self, rng: &mut Rng) -> Form {
        let forms = match self {
            Self::Learned => Form::LEARNED,
            Self::Unseen => Form::UNSEEN,
        };
        forms[rng.usize(..forms.len())]
    }

    /// In turns: two bands of a tenth each are not trained on.
    fn hue(self, rng: &mut Rng) -> f32 {
        loop {
            let hue = rng.f32();
            let unseen = (0.1..0.2).contains(&hue) || (0.55..0.65).contains(&hue);
            if unseen == (self == Self::Unseen) {
                return hue;
            }
        }
    }
}

/// What is meant by the examples of a question: a colour, which the masks have in a colour of their own.
pub struct Task {
    part: Part,
    meant: f32,
    other: f32,
    /// Of what is marked.
    pub mark: [u8; 3],
}

impl Task {
    /// Draws one.
    pub fn draw(part: Part, rng: &mut Rng) -> Self {
        let meant = part.hue(rng);
        let other = loop {
            let other = Part::Learned.hue(rng);
            let apart = (meant - other).abs();
            if apart.min(1.0 - apart) > 0.2 {
                break other;
            }
        };
        Self { part, meant, other, mark: colour(rng.f32(), 0.8, 1.0) }
    }

    /// Draws a picture of it, and what is to be marked there.
    ///
    /// # Errors
    /// Never: the sizes fit.
    pub fn example(&self, rng: &mut Rng) -> Result<Example, Error> {
        let ground = colour(rng.f32(), 0.15 * rng.f32(), 0.2 + 0.6 * rng.f32());
        let mut pixels = ground.repeat(SIDE * SIDE);
        let mut mask = vec![0; 3 * SIDE * SIDE];
        let mut near = |value: f32| value + 0.02 * (rng.f32() - 0.5);
        let colours = [near(self.meant), near(self.other)];
        let [first, second] = places(rng);
        for (which, (place, hue)) in [first, second].into_iter().zip(colours).enumerate() {
            let form = self.part.form(rng);
            let (saturation, value) = (0.75 + 0.25 * rng.f32(), 0.75 + 0.25 * rng.f32());
            let fill = colour(hue.rem_euclid(1.0), saturation, value);
            for at in (0..SIDE * SIDE).filter(|&at| form.holds(place.inside(at))) {
                pixels[3 * at..][..3].copy_from_slice(&fill);
                if which == 0 {
                    mask[3 * at..][..3].copy_from_slice(&self.mark);
                }
            }
        }
        Ok(Example { picture: Rgb8::new(SIDE, SIDE, pixels)?, answer: Rgb8::new(SIDE, SIDE, mask)? })
    }
}

/// A shape of this hue (in turns) somewhere on nothing: `SIDE * SIDE * 4` bytes of red, green, blue and opacity.
pub fn alone(form: Form, hue: f32, rng: &mut Rng) -> Vec<u8> {
    let place = Place::draw(8.0..14.0, rng);
    let [red, green, blue] = colour(hue.rem_euclid(1.0), 0.75 + 0.25 * rng.f32(), 0.75 + 0.25 * rng.f32());
    let pixel = |at| if form.holds(place.inside(at)) { [red, green, blue, 255] } else { [0; 4] };
    (0..SIDE * SIDE).flat_map(pixel).collect()
}

/// Where a shape stands.
#[derive(Clone, Copy)]
struct Place {
    centre: [f32; 2],
    radius: f32,
}

impl Place {
    fn draw(radii: Range<f32>, rng: &mut Rng) -> Self {
        let radius = radii.start + (radii.end - radii.start) * rng.f32();
        let mut along = || radius + (SIDE as f32 - 2.0 * radius) * rng.f32();
        Self { centre: [along(), along()], radius }
    }

    /// The middle of a pixel in parts of the radius from the centre.
    fn inside(self, at: usize) -> [f32; 2] {
        let [row, column] = [at / SIDE, at % SIDE].map(|place| place as f32 + 0.5);
        [(row - self.centre[0]) / self.radius, (column - self.centre[1]) / self.radius]
    }
}

/// Two that are apart.
fn places(rng: &mut Rng) -> [Place; 2] {
    loop {
        let both = [Place::draw(5.0..7.5, rng), Place::draw(5.0..7.5, rng)];
        let [a, b] = both;
        let apart = (a.centre[0] - b.centre[0]).hypot(a.centre[1] - b.centre[1]);
        if apart > a.radius + b.radius + 1.0 {
            return both;
        }
    }
}

/// Hue (in turns), saturation and value as red, green and blue.
fn colour(hue: f32, saturation: f32, value: f32) -> [u8; 3] {
    [5.0, 3.0, 1.0].map(|offset| {
        let turn = (offset + 6.0 * hue).rem_euclid(6.0);
        let part = 1.0 - saturation * turn.min(4.0 - turn).clamp(0.0, 1.0);
        (255.0 * value * part) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_of_the_wheel() {
        assert_eq!(colour(0.0, 1.0, 1.0), [255, 0, 0]);
        assert_eq!(colour(1.0 / 3.0, 1.0, 1.0), [0, 255, 0]);
        assert_eq!(colour(2.0 / 3.0, 1.0, 0.5), [0, 0, 127]);
        assert_eq!(colour(0.3, 0.0, 0.4), [102; 3]);
    }

    /// What is marked has one hue, and what is not has another; the mask has the task's colour.
    #[test]
    fn what_is_meant_is_marked() {
        let mut rng = Rng::with_seed(1);
        for part in [Part::Learned, Part::Unseen] {
            for _ in 0..20 {
                let task = Task::draw(part, &mut rng);
                let Example { picture, answer: mask } = task.example(&mut rng).unwrap();
                let marked = || mask.pixels().chunks_exact(3).map(|pixel| pixel == task.mark);
                let count = marked().filter(|&marked| marked).count();
                assert!((40..200).contains(&count), "{count}");
                let fill = picture.pixels().chunks_exact(3).zip(marked()).filter(|(_, marked)| *marked);
                let fill: Vec<&[u8]> = fill.map(|(pixel, _)| pixel).collect();
                assert!(fill.iter().all(|pixel| *pixel == fill[0]));
                let elsewhere = picture
                    .pixels()
                    .chunks_exact(3)
                    .zip(marked())
                    .any(|(pixel, marked)| !marked && pixel == fill[0]);
                assert!(!elsewhere);
            }
        }
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let draw = || {
            let mut rng = Rng::with_seed(7);
            Task::draw(Part::Learned, &mut rng).example(&mut rng).unwrap()
        };
        assert_eq!((draw().picture, draw().answer), (draw().picture, draw().answer));
        let hues = |part: Part| (0..500).map(move |seed| part.hue(&mut Rng::with_seed(seed)));
        let band = |hue: f32| (0.1..0.2).contains(&hue) || (0.55..0.65).contains(&hue);
        assert!(hues(Part::Unseen).all(band) && !hues(Part::Learned).any(band));
    }
}
