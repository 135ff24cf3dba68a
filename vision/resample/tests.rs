use safetensors::SafeTensors;

use super::*;

const FILTERS: [Filter; 6] =
    [Filter::Nearest, Filter::Lanczos, Filter::Bilinear, Filter::Bicubic, Filter::Box, Filter::Hamming];

/// `tests/reference/pictures.py` wrote what Pillow makes of pictures of odd sizes, growing and shrinking.
#[test]
fn equals_pillow_bit_for_bit() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/resample/expected.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for case in 0..8 {
        for channels in [3, 4] {
            let source = tensors.tensor(&format!("{case}.{channels}.source")).unwrap();
            let [height, width] = [source.shape()[0], source.shape()[1]];
            let samples = Samples { height, width, channels, data: source.data() };
            for (code, filter) in FILTERS.into_iter().enumerate() {
                let expected = tensors.tensor(&format!("{case}.{channels}.{code}")).unwrap();
                let size = [expected.shape()[0], expected.shape()[1]];
                let found = resize(samples, size, [0..size[0], 0..size[1]], filter);
                assert!(found == expected.data(), "case {case}, {channels} channels, {filter:?}");
            }
        }
    }
}

#[test]
fn a_window_is_a_part_of_the_whole() {
    let data: Vec<u8> = (0..31 * 23 * 3).map(|i| (i * 7919 % 256) as u8).collect();
    let samples = Samples { height: 31, width: 23, channels: 3, data: &data };
    for filter in FILTERS {
        let whole = resize(samples, [40, 9], [0..40, 0..9], filter);
        let part = resize(samples, [40, 9], [17..30, 2..6], filter);
        let cut: Vec<u8> = (17..30).flat_map(|y| whole[(y * 9 + 2) * 3..(y * 9 + 6) * 3].to_vec()).collect();
        assert_eq!(part, cut, "{filter:?}");
    }
}

#[test]
fn an_even_picture_stays_even() {
    let data = [13u8, 200, 255].repeat(19 * 8);
    let samples = Samples { height: 19, width: 8, channels: 3, data: &data };
    for filter in FILTERS {
        let found = resize(samples, [7, 33], [0..7, 0..33], filter);
        assert_eq!(found, [13u8, 200, 255].repeat(7 * 33), "{filter:?}");
    }
}
