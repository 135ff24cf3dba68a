use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

use super::*;
use crate::image::{Orientation, ReadOptions};
use crate::interpolation::Interpolation;
use crate::palette::{ClassMap, Painting, Palette};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");

/// Compares with a tensor of the reference, within the fixtures' tolerance.
fn assert_equals(found: &Pixels, tensors: &SafeTensors<'_>, key: &str, context: &str) {
    let expected = tensors.tensor(key).unwrap();
    assert_eq!([found.channels, found.height, found.width], expected.shape(), "{context}: shape");
    let numbers = expected.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let furthest =
        found.data.iter().zip(numbers).map(|(a, b)| (a - b).abs() - 1e-6 * b.abs()).fold(0.0, f32::max);
    assert!(furthest <= 2e-6, "{context}: {furthest} off");
}

/// A fixture folder: its own preprocessor on its own pictures.
fn fixture(name: &str, key: &str, pictures: usize) {
    let folder = Path::new(FIXTURES).join(name);
    let preprocessor = Preprocessor::from_folder(&folder).unwrap();
    let bytes = std::fs::read(folder.join("outputs.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for i in 0..pictures {
        let file = folder.join(format!("images/{i}.png"));
        let picture = Picture::read(&file, Orientation::AsStored).unwrap();
        let found = preprocessor.apply_picture(&picture).unwrap();
        assert_equals(&found, &tensors, &format!("{key}.{i}"), &format!("{name} picture {i}"));
        let rgb = crate::image::read(&file, ReadOptions::STORED).unwrap();
        assert_eq!(preprocessor.apply(&rgb).unwrap(), found);
        assert_eq!(preprocessor.image_size(), Some([found.height, found.width]));
    }
}

#[test]
fn clip() {
    fixture("image_clip", "pixel_values", 5);
}

#[test]
fn clip_legacy() {
    fixture("image_clip_legacy", "pixel_values", 5);
}

#[test]
fn chinese_clip() {
    fixture("image_chinese_clip", "pixel_values", 5);
}

#[test]
fn blip() {
    fixture("image_blip", "pixel_values", 5);
}

#[test]
fn vit() {
    fixture("image_vit", "pixel_values", 4);
}

#[test]
fn beit() {
    fixture("image_beit", "pixel_values", 4);
}

#[test]
fn seggpt_pictures() {
    fixture("image_seggpt", "pixel_values", 2);
}

/// The pictures of prompts, their masks by a palette of 5 classes, and the classes of what a model painted, all of
/// `SegGptImageProcessor`.
#[test]
fn seggpt_prompts_and_answers() {
    let folder = Path::new(FIXTURES).join("image_seggpt");
    let preprocessor = Preprocessor::from_folder(&folder).unwrap();
    let of_masks = Preprocessor { filter: Filter::Nearest, ..preprocessor.clone() };
    let [inputs, outputs] =
        ["inputs", "outputs"].map(|name| std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap());
    let [inputs, outputs] = [&inputs, &outputs].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let classes = |tensors: &SafeTensors<'_>, key: &str| {
        let tensor = tensors.tensor(key).unwrap();
        let class = |bytes: &[u8]| i64::from_le_bytes(bytes.try_into().unwrap()) as usize;
        let &[height, width] = tensor.shape() else { panic!("{key} is a map") };
        ClassMap { classes: tensor.data().chunks_exact(8).map(class).collect(), height, width }
    };
    let palette = Palette::new(5);
    let painted = inputs.tensor("pred_masks").unwrap();
    let &[2, 3, both, width] = painted.shape() else { panic!("two paintings") };
    let painted: Vec<f32> =
        painted.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    for i in 0..2 {
        let prompt =
            Picture::read(&folder.join(format!("images/{}.png", i + 1)), Orientation::AsStored).unwrap();
        let prompt = preprocessor.apply_picture(&prompt).unwrap();
        assert_equals(&prompt, &outputs, &format!("prompt_pixel_values.{i}"), "a prompt");
        let mask = palette.paint(&classes(&inputs, &format!("mask.{i}"))).unwrap();
        assert_equals(&of_masks.apply(&mask).unwrap(), &outputs, &format!("prompt_masks.{i}"), "a mask");
        // the answer is the lower half of each of 3 colours
        let rows = painted.chunks_exact(both * width).skip(3 * i).take(3);
        let data = rows.flat_map(|colour| &colour[both / 2 * width..]).copied().collect();
        let pixels = Pixels { data, channels: 3, height: both / 2, width };
        let wanted = classes(&outputs, &format!("segmentation.{i}"));
        let painting = Painting::new(&pixels, preprocessor.normalize)
            .resized([wanted.height, wanted.width], Interpolation::Nearest);
        assert_eq!(palette.classes(&painting), wanted, "segmentation {i}");
    }
}

#[test]
fn open_clip() {
    fixture("image_open_clip", "image", 5);
}

#[test]
fn timm() {
    fixture("image_timm", "pixel_values", 5);
}

/// Every option, on every kind of picture: `tests/reference/pictures.py` ran the references.
#[test]
fn every_option_equals_its_reference() {
    let folder = Path::new(FIXTURES).join("preprocess_cases");
    let cases: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(folder.join("cases.json")).unwrap()).unwrap();
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(cases.len(), tensors.len());
    for (i, case) in cases.iter().enumerate() {
        let file = Path::new(case["file"].as_str().unwrap());
        let preprocessor = Preprocessor::from_json(file, &case["config"].to_string()).unwrap();
        let picture = Path::new(FIXTURES).join("pictures").join(case["picture"].as_str().unwrap());
        let picture = Picture::read(&picture, Orientation::AsStored).unwrap();
        let found = preprocessor.apply_picture(&picture).unwrap();
        assert_equals(&found, &tensors, &i.to_string(), &case.to_string());
    }
}

#[test]
fn an_empty_file_means_the_class_defaults() {
    let read = |class: &str| {
        let json = format!("{{\"image_processor_type\": \"{class}\"}}");
        Preprocessor::from_json(Path::new("preprocessor_config.json"), &json).unwrap()
    };
    let clip = read("CLIPImageProcessor");
    assert_eq!(clip, read("CLIPFeatureExtractor"));
    assert_eq!(clip, read("CLIPImageProcessorFast"));
    assert_eq!((clip.resize, clip.filter), (Resize::ShortestEdge(224), Filter::Bicubic));
    assert_eq!(clip.crop, Some(Crop { size: [224, 224], centre: Centre::Floor, fill: [0; 3] }));
    assert_eq!(clip.convert, Convert::First(Background::WHITE));
    let vit = read("ViTImageProcessor");
    assert_eq!((vit.resize, vit.filter, vit.crop), (Resize::Exact([224, 224]), Filter::Bilinear, None));
    assert_eq!(vit.normalize, Some(Normalize { mean: [0.5; 3], std: [0.5; 3] }));
}

#[test]
fn the_models_image_size_decides_for_open_clip() {
    let read =
        |json: &str| Preprocessor::from_json(Path::new("open_clip_config.json"), json).unwrap().image_size();
    assert_eq!(read(r#"{"model_cfg": {"vision_cfg": {"image_size": 336}}}"#), Some([336, 336]));
    assert_eq!(read(r#"{"preprocess_cfg": {"size": [32, 48], "resize_mode": "longest"}}"#), Some([32, 48]));
    assert_eq!(read("{}"), Some([224, 224]));
}

#[test]
fn what_cannot_be_followed_is_refused_by_name() {
    let says =
        |file: &str, json: &str| Preprocessor::from_json(Path::new(file), json).unwrap_err().to_string();
    let clip = |fields: &str| {
        says(
            "preprocessor_config.json",
            &format!("{{\"image_processor_type\": \"CLIPImageProcessor\", {fields}}}"),
        )
    };
    let unknown = says("preprocessor_config.json", r#"{"image_processor_type": "Qwen2VLImageProcessor"}"#);
    assert!(
        unknown.starts_with("preprocessor_config.json: Qwen2VLImageProcessor is not a known"),
        "{unknown}"
    );
    assert!(unknown.contains("CLIPImageProcessor, ChineseCLIPImageProcessor"), "{unknown}");
    assert!(says("preprocessor_config.json", "{}").contains("without `image_processor_type`"));
    assert!(
        says("preprocessor_config.json", "{\"size\": ")
            .starts_with("preprocessor_config.json: not valid JSON")
    );
    assert_eq!(
        clip("\"size\": {\"shortest_edge\": 0}"),
        "preprocessor_config.json: `size.shortest_edge`: expected 1 to 16384 pixels, found 0"
    );
    assert!(clip("\"size\": 1000000").contains("found 1000000"));
    assert!(clip("\"size\": {\"longest_edge\": 224}").contains("`size`: expected height and width"));
    assert!(clip("\"crop_size\": {\"shortest_edge\": 224}").contains("`crop_size.height`"));
    assert!(clip("\"resample\": 6").contains("`resample`: expected 0 to 5, found 6"));
    assert!(clip("\"image_mean\": [0.1, 0.2]").contains("`image_mean`: expected one number or three"));
    assert!(clip("\"image_std\": [1, 0, 1]").contains("`image_std`"));
    assert!(clip("\"do_resize\": \"yes\"").contains("`do_resize`: expected true or false, found \"yes\""));
    assert!(clip("\"do_pad\": true").contains("`do_pad`"));
    let twice = "{\"image_processor_type\": \"EfficientNetImageProcessor\"}";
    assert!(says("preprocessor_config.json", twice).contains("`include_top`: expected false"));
    let open_clip =
        |fields: &str| says("open_clip_config.json", &format!("{{\"preprocess_cfg\": {{{fields}}}}}"));
    assert!(open_clip("\"interpolation\": \"lanczos\"").contains("`preprocess_cfg.interpolation`"));
    assert!(open_clip("\"resize_mode\": \"fit\"").contains("`preprocess_cfg.resize_mode`"));
    let timm = |fields: &str| says("config.json", &format!("{{\"pretrained_cfg\": {{{fields}}}}}"));
    assert!(
        timm("\"input_size\": [1, 28, 28]")
            .contains("`pretrained_cfg.input_size`: expected [3, height, width]")
    );
    assert!(timm("\"crop_pct\": 1e-9").contains("`pretrained_cfg.crop_pct`"));
    assert!(says("config.json", "{\"model_type\": \"bert\"}").contains("not a preprocessor file"));
    let missing = Preprocessor::from_folder(Path::new("no/such/folder")).unwrap_err().to_string();
    assert!(missing.contains("preprocessor_config.json, open_clip_config.json"), "{missing}");
}

#[test]
fn a_file_without_a_type_asks_the_model() {
    let folder = std::env::temp_dir().join(format!("volary-preprocess-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("preprocessor_config.json"), "{\"size\": 48}").unwrap();
    std::fs::write(folder.join("config.json"), "{\"model_type\": \"vit\"}").unwrap();
    let found = Preprocessor::from_folder(&folder);
    std::fs::write(folder.join("config.json"), "{\"model_type\": \"opera\"}").unwrap();
    let refused = Preprocessor::from_folder(&folder);
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(found.unwrap().resize, Resize::Exact([48, 48]));
    assert!(refused.unwrap_err().to_string().contains("model_type \"opera\""));
}

fn clip_32() -> Preprocessor {
    Preprocessor::from_folder(&Path::new(FIXTURES).join("image_clip")).unwrap()
}

#[test]
fn a_batch_holds_what_apply_gives() {
    let images: Vec<Rgb8> = [(40, 33), (1, 1), (200, 31)]
        .iter()
        .map(|&(width, height)| {
            let pixels = (0..width * height * 3).map(|i| (i * 31 % 251) as u8).collect();
            Rgb8::new(width, height, pixels).unwrap()
        })
        .collect();
    let preprocessor = clip_32();
    let batch = preprocessor.batch(&images, &Device::default()).unwrap();
    assert_eq!(batch.dims(), [3, 3, 32, 32]);
    let one_by_one: Vec<f32> =
        images.iter().flat_map(|image| preprocessor.apply(image).unwrap().data).collect();
    assert_eq!(batch.into_data().try_to_vec::<f32>().unwrap(), one_by_one);
    assert!(matches!(preprocessor.batch(&[], &Device::default()), Err(PreprocessError::EmptyBatch)));
    let ragged = Preprocessor { crop: None, ..preprocessor }.batch(&images, &Device::default());
    assert!(matches!(ragged, Err(PreprocessError::Ragged { index: 1, found: [32, 32], .. })));
}

#[test]
fn one_pixel_and_twenty_megapixels() {
    let preprocessor = clip_32();
    let dot = preprocessor.apply(&Rgb8::new(1, 1, vec![255, 0, 128]).unwrap()).unwrap();
    assert!(dot.data[..1024].iter().all(|&x| x == dot.data[0]));
    let photo = Rgb8::new(5472, 3648, vec![77; 5472 * 3648 * 3]).unwrap();
    let grey = preprocessor.apply(&photo).unwrap();
    assert!(grey.data[..1024].iter().all(|&x| x == (77.0 / 255.0 - 0.48145466) / 0.26862954));
}

/// Resized to 32 pixels across, this is 3.2 megapixels down; only the part that is cut out is computed.
#[test]
fn a_thread_of_a_picture_costs_what_its_centre_costs() {
    let thread = Rgb8::new(1, 100_000, vec![9; 300_000]).unwrap();
    assert_eq!(clip_32().apply(&thread).unwrap().height, 32);
    let long = Rgb8::new(1, 10_000_000, vec![9; 30_000_000]).unwrap();
    let unbounded = Preprocessor { crop: None, ..clip_32() };
    assert!(matches!(unbounded.apply(&long), Err(PreprocessError::TooLarge { .. })));
}
