use std::path::PathBuf;

use safetensors::SafeTensors;

use super::*;

fn folder() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/pictures").into()
}

fn files() -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext != "safetensors"))
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_string(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    assert!(files.len() > 30);
    files
}

/// Every format and colour type, as Pillow converts it: as stored, and as seen.
#[test]
fn equals_pillow() {
    let bytes = std::fs::read(folder().join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (name, bytes) in files() {
        for (kind, options) in [("stored", ReadOptions::STORED), ("seen", ReadOptions::SEEN)] {
            let expected = tensors.tensor(&format!("{name}.{kind}")).unwrap();
            let found = decode(&bytes, &name, options).unwrap();
            assert_eq!([found.height(), found.width(), 3], expected.shape(), "{name} {kind}");
            let furthest =
                found.pixels().iter().zip(expected.data()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            // The JPEG standard leaves decoders room; these were saved without chroma subsampling or smooth.
            let room = if name.ends_with(".jpg") { 3 } else { 0 };
            assert!(furthest <= room, "{name} {kind}: {furthest} grey levels off");
        }
    }
}

#[test]
fn sixteen_bit_grey_keeps_its_high_byte() {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 3, 1);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Sixteen);
    encoder.write_header().unwrap().write_image_data(&[0x00, 0xFF, 0x12, 0x34, 0xFF, 0x00]).unwrap();
    let found = decode(&file, "grey16", ReadOptions::STORED).unwrap();
    assert_eq!(found.pixels(), [0, 0, 0, 0x12, 0x12, 0x12, 0xFF, 0xFF, 0xFF]);
}

#[test]
fn a_background_shows_where_a_picture_is_transparent() {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 2, 1);
    encoder.set_color(png::ColorType::Rgba);
    encoder.write_header().unwrap().write_image_data(&[9, 8, 7, 0, 10, 20, 30, 255]).unwrap();
    let read = |background| {
        let options = ReadOptions { orientation: Orientation::AsStored, background };
        decode(&file, "two", options).unwrap().into_pixels()
    };
    assert_eq!(read(Background::DropAlpha), [9, 8, 7, 10, 20, 30]);
    assert_eq!(read(Background::WHITE), [255, 255, 255, 10, 20, 30]);
    assert_eq!(read(Background::Over([1, 2, 3])), [1, 2, 3, 10, 20, 30]);
}

/// No prefix of a file and no damage to it may panic; a prefix that lacks pixels may not pass as a picture.
#[test]
fn damage_is_an_error_or_a_picture() {
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    for (name, bytes) in files() {
        for end in 0..bytes.len() {
            let found = decode(&bytes[..end], &name, ReadOptions::SEEN);
            assert!(
                end > bytes.len() / 2 || found.is_err(),
                "{name} passed when cut to {end} of {} bytes",
                bytes.len()
            );
        }
        for _ in 0..150 {
            let mut damaged = bytes.clone();
            for _ in 0..=random(4) {
                // Headers are short: half of the damage goes to the first bytes.
                let reach = if random(2) == 0 { bytes.len().min(64) } else { bytes.len() };
                damaged[random(reach)] = random(256) as u8;
            }
            if let Err(error) = decode(&damaged, &name, ReadOptions::SEEN) {
                assert!(error.to_string().starts_with(&name), "{error}");
            }
        }
    }
}

#[test]
fn a_jpeg_cut_within_its_pixels_is_refused() {
    let (name, bytes) = files().into_iter().find(|(name, _)| name == "rgb.jpg").unwrap();
    let error = decode(&bytes[..bytes.len() - 20], &name, ReadOptions::SEEN).unwrap_err();
    assert_eq!(error.to_string(), "rgb.jpg: damaged or truncated JPEG: it ends within its pixels");
}

#[test]
fn errors_name_the_file_and_what_it_holds() {
    let says = |bytes: &[u8]| decode(bytes, "a.png", ReadOptions::SEEN).unwrap_err().to_string();
    assert_eq!(says(b""), "a.png: the file is empty; expected a picture");
    assert_eq!(
        says("BM 你好, a note\nof two lines".as_bytes()),
        "a.png: not a picture: expected PNG, JPEG, WebP, GIF or BMP, found text that begins \"BM 你好, a note\\nof two lines\""
    );
    assert!(says(b"version https://git-lfs.github.com/spec/v1\n").contains("found a Git LFS pointer"));
    assert!(says(b"\0\x01\x02\x03").ends_with("found bytes that begin 00 01 02 03"));
    assert!(says(b"II*\0....").starts_with("a.png: TIFF is not supported"));
    assert!(says(b"\0\0\0\x1cftypheic....").starts_with("a.png: HEIC is not supported"));
    let missing = read(Path::new("no/such.png"), ReadOptions::SEEN).unwrap_err();
    assert!(missing.to_string().starts_with("no/such.png: "), "{missing}");
}

/// A header costs nothing to write; its size is checked before anything is allocated.
#[test]
fn a_bomb_is_refused_by_its_header() {
    let bomb = |width: u32, height: u32| {
        let mut file = Vec::new();
        let mut header = b"IHDR".to_vec();
        header.extend(width.to_be_bytes());
        header.extend(height.to_be_bytes());
        header.extend([8, 2, 0, 0, 0]);
        file.extend(b"\x89PNG\r\n\x1a\n\0\0\0\x0D");
        file.extend(&header);
        file.extend(crc(&header).to_be_bytes());
        file.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xaeB`\x82");
        decode(&file, "bomb.png", ReadOptions::SEEN).unwrap_err()
    };
    assert!(matches!(
        bomb(100_000, 100_000),
        ImageError::TooLarge { found: 10_000_000_000, unit: "pixels", .. }
    ));
    assert!(matches!(bomb(0, 5), ImageError::ZeroSize { .. } | ImageError::Damaged { .. }));
    let mut gif = b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\x02\x02\x44\x01\0;".to_vec();
    assert!(decode(&gif, "a.gif", ReadOptions::SEEN).is_err());
    gif[6..10].fill(0xFF);
    assert!(matches!(decode(&gif, "a.gif", ReadOptions::SEEN), Err(ImageError::TooLarge { .. })));
    let mut bmp = files().into_iter().find(|(name, _)| name == "rgb.bmp").unwrap().1;
    bmp[18..26].copy_from_slice(&[0, 0, 1, 0, 0, 0, 1, 0]);
    assert!(decode(&bmp, "a.bmp", ReadOptions::SEEN).is_err());
}

/// The checksum of a PNG chunk.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn pixels_must_fill_their_size() {
    assert!(matches!(Rgb8::new(2, 2, vec![0; 11]), Err(ImageError::Length { expected: 12, found: 11, .. })));
    assert!(matches!(Rgb8::new(0, 2, vec![]), Err(ImageError::ZeroSize { .. })));
    assert_eq!(Rgb8::new(2, 1, vec![1, 2, 3, 4, 5, 6]).unwrap().pixels(), [1, 2, 3, 4, 5, 6]);
}

/// A JPEG of two pixels side by side, dark and light, with an EXIF segment written by hand around each orientation.
#[test]
fn a_photo_stands_as_its_exif_says() {
    let two = Rgb8::new(16, 8, vec![[[20; 24], [230; 24]].concat(); 8].concat()).unwrap();
    let plain = two.to_jpeg(95).unwrap();
    // (orientation, sides, whether the picture's first pixel is the dark one)
    let cases = [
        (1, [16, 8], true),
        (2, [16, 8], false),
        (3, [16, 8], false),
        (4, [16, 8], true),
        (5, [8, 16], true),
        (6, [8, 16], true),
        (7, [8, 16], false),
        (8, [8, 16], false),
    ];
    for (orientation, sides, dark) in cases {
        // one tag in big-endian TIFF: 0x0112, a short, once
        let tag = [0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0];
        let tiff = [&b"Exif\0\0MM\0*\0\0\0\x08\0\x01"[..], &tag, &[0; 4]].concat();
        let length = (tiff.len() as u16 + 2).to_be_bytes();
        let file = [&plain[..2], &[0xFF, 0xE1], &length, &tiff, &plain[2..]].concat();
        let seen = decode(&file, "photo.jpg", ReadOptions::SEEN).unwrap();
        assert_eq!([seen.width(), seen.height()], sides, "{orientation}");
        assert_eq!(seen.pixels()[0] < 128, dark, "{orientation}");
        let last = seen.pixels()[seen.pixels().len() - 1];
        assert_eq!(last < 128, !dark, "{orientation}");
        let stored = decode(&file, "photo.jpg", ReadOptions::STORED).unwrap();
        assert_eq!(([stored.width(), stored.height()], stored.pixels()[0] < 128), ([16, 8], true));
        assert_eq!(size(&file, "photo.jpg").unwrap(), [8, 16]);
    }
}

#[test]
fn sizes_are_read_from_headers() {
    for (name, bytes) in files() {
        let picture = decode(&bytes, &name, ReadOptions::STORED).unwrap();
        assert_eq!(size(&bytes, &name).unwrap(), [picture.height() as u64, picture.width() as u64], "{name}");
    }
    assert!(size(b"no picture", "a").is_err());
}

#[test]
fn thumbnails_fit() {
    let wide = Rgb8::new(100, 1, vec![9; 300]).unwrap();
    let small = wide.thumbnail(10);
    assert_eq!((small.width(), small.height(), small.pixels()), (10, 1, &[9; 30][..]));
    assert_eq!(wide.thumbnail(100), wide);
    let tall = Rgb8::new(30, 60, vec![200; 30 * 60 * 3]).unwrap().thumbnail(20);
    assert_eq!((tall.width(), tall.height()), (10, 20));
    let again = decode(&tall.to_jpeg(80).unwrap(), "small.jpg", ReadOptions::SEEN).unwrap();
    assert!(again.pixels().iter().all(|value| value.abs_diff(200) < 4));
    assert!(Rgb8::new(70_000, 1, vec![0; 210_000]).unwrap().to_jpeg(80).is_err());
}

/// What is no picture is refused by its first bytes, however long it is.
#[test]
fn a_long_file_that_is_no_picture_is_not_read() {
    let folder = std::env::temp_dir().join(format!("volary-image-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (film, long) = (folder.join("film.jpg"), folder.join("long.png"));
    std::fs::write(&film, [0; 4096]).unwrap();
    std::fs::write(&long, b"\x89PNG\r\n\x1a\n").unwrap();
    // sparse: it takes no room
    File::options().write(true).open(&long).unwrap().set_len(MAX_BYTES + 1).unwrap();
    let told = [&film, &long].map(|path| content(path).unwrap_err().to_string());
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(told[0].contains("not a picture"), "{}", told[0]);
    assert!(told[1].contains("1073741825 bytes; at most 1073741824 are read"), "{}", told[1]);
}

#[test]
fn a_png_s_texts_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.png");
    let picture = Rgb8::new(2, 1, vec![1, 2, 3, 4, 5, 6]).unwrap();
    let texts = [("Software", "Volary"), ("volary", "{\"prompt\": \"一只猫\\n\"}")];
    picture.save_png_with(&file, &texts).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let found = png_texts(&bytes, "a.png").unwrap();
    assert_eq!(found, texts.map(|(keyword, text)| (keyword.to_owned(), text.to_owned())));
    assert_eq!(decode(&bytes, "a.png", ReadOptions::SEEN).unwrap(), picture);
    for end in 0..bytes.len() {
        assert!(png_texts(&bytes[..end], "a.png").is_err(), "{end}");
    }
    let told = png_texts(&picture.to_jpeg(90).unwrap(), "a.jpg").unwrap_err().to_string();
    assert!(told.contains("no PNG"), "{told}");
    let told = picture.save_png_with(&file, &[("", "no keyword")]).unwrap_err().to_string();
    assert!(told.contains("a.png"), "{told}");
    assert_eq!(std::fs::read(&file).unwrap(), bytes);
}

#[test]
fn pictures_are_laid_out_in_rows() {
    let dot = |value| Rgb8::new(2, 1, vec![value; 6]).unwrap();
    let sheet = Rgb8::sheet(&[dot(1), dot(2), dot(3)], 2).unwrap();
    assert_eq!([sheet.width(), sheet.height()], [4, 2]);
    let values: Vec<u8> = sheet.pixels().iter().copied().step_by(3).collect();
    assert_eq!(values, [1, 1, 2, 2, 3, 3, 0, 0]);
    let other = Rgb8::new(1, 2, vec![0; 6]).unwrap();
    assert!(Rgb8::sheet(&[dot(1), other], 2).is_err());
    assert!(Rgb8::sheet(&[], 2).is_err() && Rgb8::sheet(&[dot(1)], 0).is_err());
}
