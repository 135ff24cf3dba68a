//! Random views of a small picture with transparency.

use fastrand::Rng;

use super::data::Freedom;

/// A square picture, `size * size` pixels of red, green, blue, alpha in 0..1, colours times alpha.
struct Layer {
    size: usize,
    pixels: Vec<[f32; 4]>,
}

/// One random view: `size * size * 4` bytes of straight-alpha RGBA to `3 * size * size` values in 0..1,
/// channel after channel. `strength` scales how often and how far the view strays: 1 is all of it.
pub fn augment(rgba: &[u8], size: usize, freedom: Freedom, strength: f32, rng: &mut Rng) -> Vec<f32> {
    let mut layer = Layer::from_rgba(rgba, size);
    layer = layer.warp(freedom, strength, rng);
    if chance(rng, 0.65 * strength) {
        layer.recolour(strength, rng);
    }
    if chance(rng, 0.45 * (0.5 + 0.5 * strength)) {
        layer.ink(rng);
    }
    let mut picture = layer.over(&backdrop(size, strength, rng));
    if chance(rng, 0.2 * strength) {
        soften(&mut picture, size);
    }
    if chance(rng, 0.25 * strength) {
        cover(&mut picture, size, rng);
    }
    if chance(rng, 0.25 * strength) {
        let strength = between(rng, 0.0, 0.05);
        for value in picture.iter_mut().flatten() {
            *value += strength * normal(rng);
        }
    }
    planes(&picture)
}

fn planes(picture: &[[f32; 3]]) -> Vec<f32> {
    (0..3).flat_map(|channel| picture.iter().map(move |pixel| pixel[channel].clamp(0.0, 1.0))).collect()
}

impl Layer {
    fn from_rgba(rgba: &[u8], size: usize) -> Self {
        let pixels = rgba.chunks_exact(4).map(|pixel| {
            let alpha = pixel[3] as f32 / 255.0;
            let colour = |channel: usize| pixel[channel] as f32 / 255.0 * alpha;
            [colour(0), colour(1), colour(2), alpha]
        });
        Self { size, pixels: pixels.collect() }
    }

    /// Nothing outside the picture.
    fn at(&self, x: i32, y: i32) -> [f32; 4] {
        let inside = 0..self.size as i32;
        if inside.contains(&x) && inside.contains(&y) {
            self.pixels[y as usize * self.size + x as usize]
        } else {
            [0.0; 4]
        }
    }

    fn bilinear(&self, x: f32, y: f32) -> [f32; 4] {
        let (left, top) = (x.floor(), y.floor());
        let (fx, fy) = (x - left, y - top);
        let (left, top) = (left as i32, top as i32);
        let corners =
            [self.at(left, top), self.at(left + 1, top), self.at(left, top + 1), self.at(left + 1, top + 1)];
        core::array::from_fn(|channel| {
            let upper = corners[0][channel] * (1.0 - fx) + corners[1][channel] * fx;
            let lower = corners[2][channel] * (1.0 - fx) + corners[3][channel] * fx;
            upper * (1.0 - fy) + lower * fy
        })
    }

    /// Scale, aspect, rotation, shear, shift, mirroring.
    fn warp(&self, freedom: Freedom, strength: f32, rng: &mut Rng) -> Layer {
        let scale = 1.0 + strength * between(rng, -0.5, 0.16);
        let aspect = (strength * between(rng, -0.15, 0.15)).exp();
        let angle = if chance(rng, 0.7) { strength * between(rng, -0.35, 0.35) } else { 0.0 };
        let shear = if chance(rng, 0.4) { strength * between(rng, -0.2, 0.2) } else { 0.0 };
        let mirrored = freedom == Freedom::Mirror && chance(rng, 0.3);
        let half = (self.size as f32 - 1.0) / 2.0;
        let reach = strength * 0.1 * self.size as f32;
        let (dx, dy) = (between(rng, -reach, reach), between(rng, -reach, reach));
        let (sine, cosine) = angle.sin_cos();
        let side = if mirrored { -1.0 } else { 1.0 };
        let pixels = (0..self.size * self.size).map(|index| {
            let x = (index % self.size) as f32 - half - dx;
            let y = (index / self.size) as f32 - half - dy;
            let (x, y) = (cosine * x + sine * y, cosine * y - sine * x);
            let x = x + shear * y;
            let (x, y) = (x * side / (scale * aspect), y * aspect / scale);
            self.bilinear(x + half, y + half)
        });
        Layer { size: self.size, pixels: pixels.collect() }
    }

    /// Hue, saturation, contrast, brightness, and tinting.
    fn recolour(&mut self, strength: f32, rng: &mut Rng) {
        let spread = if chance(rng, 0.08 * strength) { 3.1 } else { 0.25 * strength };
        let (sine, cosine) = between(rng, -spread, spread).sin_cos();
        let grey = chance(rng, 0.08 * strength);
        let saturation = if grey { 0.0 } else { 1.0 + strength * between(rng, -0.6, 0.6) };
        let contrast = 1.0 + strength * between(rng, -0.4, 0.35);
        let lift = strength * between(rng, -0.15, 0.2);
        let gains: [f32; 3] = core::array::from_fn(|_| 1.0 + strength * between(rng, -0.15, 0.15));
        for pixel in &mut self.pixels {
            let [red, green, blue, alpha] = *pixel;
            // In YIQ a rotation of (I, Q) turns the hue.
            let y = 0.299 * red + 0.587 * green + 0.114 * blue;
            let i = 0.596 * red - 0.274 * green - 0.322 * blue;
            let q = 0.211 * red - 0.523 * green + 0.312 * blue;
            let (i, q) = (saturation * (cosine * i - sine * q), saturation * (sine * i + cosine * q));
            let rgb = [y + 0.956 * i + 0.621 * q, y - 0.272 * i - 0.647 * q, y - 1.106 * i + 1.703 * q];
            for channel in 0..3 {
                let value = (rgb[channel] - 0.5 * alpha) * contrast + (0.5 + lift) * alpha;
                pixel[channel] = (value * gains[channel]).clamp(0.0, alpha);
            }
        }
    }

    /// Draws dark contours along the edges of colour and shape, over fills that are kept, flattened to
    /// few tones, paled, or left out: the look of outlined pictograms.
    fn ink(&mut self, rng: &mut Rng) {
        let threshold = between(rng, 0.25, 0.7);
        let mut contour = self.edges(threshold);
        if chance(rng, 0.5) {
            contour = widen(&contour, self.size);
        }
        let darkness = between(rng, 0.0, 0.2);
        let tones = if chance(rng, 0.5) { Some(between(rng, 2.0, 6.0)) } else { None };
        let pale = if chance(rng, 0.35) { between(rng, 0.3, 1.0) } else { 0.0 };
        let hollow = chance(rng, 0.08);
        for (pixel, ink) in self.pixels.iter_mut().zip(contour) {
            let [red, green, blue, alpha] = *pixel;
            let fill = |colour: f32| {
                let flat = tones.map_or(colour, |tones| ((colour * tones).round() / tones).min(alpha));
                flat + (alpha - flat) * pale
            };
            let inked = |colour: f32| if hollow { 0.0 } else { fill(colour) } * (1.0 - ink) + darkness * ink;
            let covered = if hollow { 0.0 } else { alpha } * (1.0 - ink) + ink;
            *pixel = [inked(red), inked(green), inked(blue), covered];
        }
    }

    /// Sobel magnitude of colours over white and of alpha, as ink between 0 and 1.
    fn edges(&self, threshold: f32) -> Vec<f32> {
        let size = self.size as i32;
        let over_white = |x: i32, y: i32| {
            let [red, green, blue, alpha] = self.at(x, y);
            [red + 1.0 - alpha, green + 1.0 - alpha, blue + 1.0 - alpha, alpha]
        };
        let mut edges = Vec::with_capacity(self.pixels.len());
        for y in 0..size {
            for x in 0..size {
                let around: [[[f32; 4]; 3]; 3] = core::array::from_fn(|j| {
                    core::array::from_fn(|i| over_white(x + i as i32 - 1, y + j as i32 - 1))
                });
                let slope = |channel: usize| {
                    let at = |j: usize, i: usize| around[j][i][channel];
                    let gx = at(0, 2) + 2.0 * at(1, 2) + at(2, 2) - at(0, 0) - 2.0 * at(1, 0) - at(2, 0);
                    let gy = at(2, 0) + 2.0 * at(2, 1) + at(2, 2) - at(0, 0) - 2.0 * at(0, 1) - at(0, 2);
                    (gx * gx + gy * gy).sqrt() / 4.0
                };
                let strongest = (0..4).map(slope).fold(0.0, f32::max);
                edges.push(((strongest - 0.4 * threshold) / (0.6 * threshold)).clamp(0.0, 1.0));
            }
        }
        edges
    }

    fn over(&self, backdrop: &[[f32; 3]]) -> Vec<[f32; 3]> {
        let pixels = self.pixels.iter().zip(backdrop);
        pixels
            .map(|(&[red, green, blue, alpha], behind)| {
                let rest = 1.0 - alpha;
                [red + behind[0] * rest, green + behind[1] * rest, blue + behind[2] * rest]
            })
            .collect()
    }
}

/// Every pixel takes the most ink of itself and its right and lower neighbours: lines of two pixels.
fn widen(ink: &[f32], size: usize) -> Vec<f32> {
    (0..ink.len())
        .map(|index| {
            let right = if index % size + 1 < size { ink[index + 1] } else { 0.0 };
            let below = ink.get(index + size).copied().unwrap_or(0.0);
            ink[index].max(right).max(below)
        })
        .collect()
}

/// White most of the time, else another colour or a gradient between two.
fn backdrop(size: usize, strength: f32, rng: &mut Rng) -> Vec<[f32; 3]> {
    let colour = |rng: &mut Rng| -> [f32; 3] {
        let light = between(rng, 0.0, 1.0);
        core::array::from_fn(|_| (light + between(rng, -0.4, 0.4)).clamp(0.0, 1.0))
    };
    if !chance(rng, 0.4 * strength) {
        return vec![[1.0; 3]; size * size];
    }
    let first = colour(rng);
    let second = if chance(rng, 0.6) { first } else { colour(rng) };
    let (dx, dy) = (between(rng, -1.0, 1.0), between(rng, -1.0, 1.0));
    (0..size * size)
        .map(|index| {
            let x = (index % size) as f32 / size as f32 - 0.5;
            let y = (index / size) as f32 / size as f32 - 0.5;
            let mix = (0.5 + dx * x + dy * y).clamp(0.0, 1.0);
            core::array::from_fn(|channel| first[channel] * (1.0 - mix) + second[channel] * mix)
        })
        .collect()
}

/// A 3x3 mean.
fn soften(picture: &mut Vec<[f32; 3]>, size: usize) {
    let source = core::mem::take(picture);
    let last = size - 1;
    *picture = (0..size * size)
        .map(|index| {
            let (x, y) = (index % size, index / size);
            let mut sum = [0.0; 3];
            let mut count = 0.0;
            for row in y.saturating_sub(1)..=(y + 1).min(last) {
                for column in x.saturating_sub(1)..=(x + 1).min(last) {
                    let pixel = source[row * size + column];
                    sum = core::array::from_fn(|channel| sum[channel] + pixel[channel]);
                    count += 1.0;
                }
            }
            sum.map(|value| value / count)
        })
        .collect();
}

/// Hides a random rectangle.
fn cover(picture: &mut [[f32; 3]], size: usize, rng: &mut Rng) {
    let side = |rng: &mut Rng| rng.usize(size / 8..size * 3 / 8);
    let (width, height) = (side(rng), side(rng));
    let (left, top) = (rng.usize(0..size - width), rng.usize(0..size - height));
    let colour: [f32; 3] = core::array::from_fn(|_| rng.f32());
    for row in top..top + height {
        picture[row * size + left..row * size + left + width].fill(colour);
    }
}

fn chance(rng: &mut Rng, probability: f32) -> bool {
    rng.f32() < probability
}

fn between(rng: &mut Rng, low: f32, high: f32) -> f32 {
    low + (high - low) * rng.f32()
}

/// Standard normal by Box and Muller.
fn normal(rng: &mut Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.f32()).ln()).sqrt();
    radius * (core::f32::consts::TAU * rng.f32()).cos()
}
