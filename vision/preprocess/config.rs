//! The three libraries' files, read into a [`Preprocessor`]. Their defaults are rows of data; a value that cannot be
//! followed exactly is refused by name.

use std::path::Path;

use serde_json::Value;

use super::{Centre, Convert, Crop, MAX_SIDE, Normalize, PreprocessError, Preprocessor, Rescale, Resize};
use crate::image::Background;
use crate::resample::Filter;

const PROCESSOR: &str = "processor_config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";
const OPEN_CLIP: &str = "open_clip_config.json";
const CONFIG: &str = "config.json";
const FILES: &[&str] = &[PROCESSOR, PREPROCESSOR, OPEN_CLIP, CONFIG];

const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];
const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];
const HALF: [f64; 3] = [0.5; 3];

/// What an image processor of transformers does where its file is silent.
struct Class {
    /// Without `ImageProcessor`.
    name: &'static str,
    filter: Filter,
    mean: [f64; 3],
    std: [f64; 3],
    resize: Resize,
    /// Whether a bare number as `size` means a square, and not the shortest edge.
    square: bool,
    crop: Option<usize>,
    do_center_crop: bool,
    /// Whether pictures are turned into RGB, over white.
    do_convert_rgb: bool,
}

const CLIP: Class = Class {
    name: "CLIP",
    filter: Filter::Bicubic,
    mean: CLIP_MEAN,
    std: CLIP_STD,
    resize: Resize::ShortestEdge(224),
    square: false,
    crop: Some(224),
    do_center_crop: true,
    do_convert_rgb: true,
};

const VIT: Class = Class {
    name: "ViT",
    filter: Filter::Bilinear,
    mean: HALF,
    std: HALF,
    resize: Resize::Exact([224, 224]),
    square: true,
    crop: None,
    do_center_crop: false,
    do_convert_rgb: false,
};

/// The only one with `rescale_offset` and `include_top`.
const EFFICIENT_NET: &str = "EfficientNet";

/// From the class attributes in transformers 5.23, `models/*/image_processing_pil_*.py`.
const CLASSES: &[Class] = &[
    CLIP,
    Class { name: "ChineseCLIP", ..CLIP },
    Class { name: "Bit", ..CLIP },
    VIT,
    Class { name: "Beit", filter: Filter::Bicubic, crop: Some(224), ..VIT },
    Class {
        name: "DeiT",
        filter: Filter::Bicubic,
        resize: Resize::Exact([256, 256]),
        crop: Some(224),
        do_center_crop: true,
        ..VIT
    },
    Class {
        name: EFFICIENT_NET,
        filter: Filter::Bicubic,
        resize: Resize::Exact([346, 346]),
        crop: Some(289),
        ..VIT
    },
    Class { name: "Siglip", filter: Filter::Bicubic, square: false, do_convert_rgb: true, ..VIT },
    Class {
        name: "Blip",
        resize: Resize::Exact([384, 384]),
        square: true,
        crop: None,
        do_center_crop: false,
        ..CLIP
    },
    // `do_convert_rgb` concerns its masks; its pictures are taken to be RGB.
    Class {
        name: "SegGpt",
        filter: Filter::Bicubic,
        mean: IMAGENET_MEAN,
        std: IMAGENET_STD,
        resize: Resize::Exact([448, 448]),
        ..VIT
    },
];

/// The class that transformers takes for a `model_type`, where the preprocessor's file names none.
const MODEL_TYPES: &[(&str, &str)] = &[
    ("align", EFFICIENT_NET),
    ("altclip", "CLIP"),
    ("beit", "Beit"),
    ("blip", "Blip"),
    ("blip-2", "Blip"),
    ("chinese_clip", "ChineseCLIP"),
    ("clip", "CLIP"),
    ("clipseg", "ViT"),
    ("data2vec-vision", "Beit"),
    ("deit", "DeiT"),
    ("dinov2", "Bit"),
    ("efficientnet", EFFICIENT_NET),
    ("metaclip_2", "CLIP"),
    ("seggpt", "SegGpt"),
    ("siglip", "Siglip"),
    ("vit", "ViT"),
    ("vit_mae", "ViT"),
];

pub(super) fn text(file: &Path) -> Result<String, PreprocessError> {
    std::fs::read_to_string(file).map_err(|source| PreprocessError::Io { file: file.to_path_buf(), source })
}

fn parse(file: &Path, json: &str) -> Result<Value, PreprocessError> {
    serde_json::from_str(json).map_err(|source| PreprocessError::Json { file: file.to_path_buf(), source })
}

pub(super) fn from_folder(folder: &Path) -> Result<Preprocessor, PreprocessError> {
    for name in FILES {
        let file = folder.join(name);
        if !file.is_file() {
            continue;
        }
        let json = parse(&file, &text(&file)?)?;
        let describes = match *name {
            PROCESSOR => json.get("image_processor").is_some(),
            CONFIG => is_timm(&json),
            _ => true,
        };
        if describes {
            return read(&file, &json, || model_type(&folder.join(CONFIG)));
        }
    }
    Err(PreprocessError::Missing { folder: folder.to_path_buf(), looked_for: FILES })
}

pub(super) fn from_json(file: &Path, json: &str) -> Result<Preprocessor, PreprocessError> {
    read(file, &parse(file, json)?, || None)
}

/// The `model_type` that a checkpoint's `config.json` gives, if it gives one.
fn model_type(file: &Path) -> Option<String> {
    let json = parse(file, &text(file).ok()?).ok()?;
    json.get("model_type")?.as_str().map(str::to_string)
}

fn is_timm(json: &Value) -> bool {
    json.get("pretrained_cfg").is_some()
        || (json.get("architecture").is_some() && json.get("input_size").is_some())
}

fn read(
    file: &Path,
    json: &Value,
    model_type: impl Fn() -> Option<String>,
) -> Result<Preprocessor, PreprocessError> {
    let root = Fields { file, path: String::new(), json };
    if !json.is_object() {
        return Err(root.wrong("", "an object"));
    }
    match file.file_name().and_then(|name| name.to_str()) {
        Some(PROCESSOR) => transformers(root.inside("image_processor")?, model_type),
        Some(PREPROCESSOR) => transformers(root, model_type),
        Some(OPEN_CLIP) => open_clip(root),
        Some(CONFIG) if json.get("pretrained_cfg").is_some() => timm(root.inside("pretrained_cfg")?),
        Some(CONFIG) if is_timm(json) => timm(root),
        _ => Err(PreprocessError::UnknownFile { file: file.to_path_buf(), known: FILES }),
    }
}

/// transformers' image processors that do no more than resize, crop, rescale and normalise.
///
/// A null there is not a missing field: it overrides the class's default. As a flag it means no; where a value is
/// needed, transformers fails, and so does this.
fn transformers(
    fields: Fields<'_>,
    model_type: impl Fn() -> Option<String>,
) -> Result<Preprocessor, PreprocessError> {
    let class = class(&fields, model_type)?;
    if fields.flag("do_pad", false)? {
        return Err(fields.wrong("do_pad", "false (padding is not implemented)"));
    }
    let resize = match fields.flag("do_resize", true)? {
        false => Resize::Keep,
        true if class.name == CLIP.name && fields.flag("use_square_size", false)? => {
            Resize::Exact([224, 224])
        }
        true => transformers_size(&fields, class)?,
    };
    let crop = match fields.flag("do_center_crop", class.do_center_crop)? {
        false => None,
        true => {
            let size = match (fields.json.get("crop_size"), class.crop) {
                (None, Some(side)) => [side, side],
                (Some(Value::Object(_)), _) => {
                    let inner = fields.inside("crop_size")?;
                    [inner.side("height")?, inner.side("width")?]
                }
                (Some(Value::Number(_) | Value::Array(_)), _) => fields.sides("crop_size")?,
                _ => {
                    return Err(fields.wrong("crop_size", "a size, since `do_center_crop` is true"));
                }
            };
            Some(Crop { size, centre: Centre::Floor, fill: [0; 3] })
        }
    };
    let filter = match fields.json.get("resample") {
        None => class.filter,
        Some(Value::Null) if resize == Resize::Keep => class.filter,
        Some(code) => match code.as_u64() {
            Some(0) => Filter::Nearest,
            Some(1) => Filter::Lanczos,
            Some(2) => Filter::Bilinear,
            Some(3) => Filter::Bicubic,
            Some(4) => Filter::Box,
            Some(5) => Filter::Hamming,
            _ => return Err(fields.wrong("resample", "0 to 5")),
        },
    };
    let efficient_net = class.name == EFFICIENT_NET;
    if efficient_net && fields.flag("include_top", true)? {
        return Err(fields.wrong("include_top", "false (a second normalization is not implemented)"));
    }
    let rescale = match fields.flag("do_rescale", true)? {
        true => {
            fields.not_null(&["rescale_factor"])?;
            let factor = fields.number("rescale_factor", 1.0 / 255.0)?;
            match efficient_net && fields.flag("rescale_offset", false)? {
                true => Rescale::TimesLessOne(factor),
                false => Rescale::Times(factor),
            }
        }
        false => Rescale::Keep,
    };
    let normalize = match fields.flag("do_normalize", true)? {
        true => {
            fields.not_null(&["image_mean", "image_std"])?;
            Some(fields.normalize(["image_mean", "image_std"], class.mean, class.std)?)
        }
        false => None,
    };
    // SegGPT's flag concerns its masks.
    let to_rgb = class.name != "SegGpt" && fields.flag("do_convert_rgb", class.do_convert_rgb)?;
    let background = if to_rgb { Background::WHITE } else { Background::DropAlpha };
    Ok(Preprocessor { convert: Convert::First(background), resize, filter, crop, rescale, normalize })
}

/// The class that a file names; of old it named a feature extractor.
fn class(
    fields: &Fields<'_>,
    model_type: impl Fn() -> Option<String>,
) -> Result<&'static Class, PreprocessError> {
    let named = match (fields.text("image_processor_type")?, fields.text("feature_extractor_type")?) {
        (Some(name), _) | (None, Some(name)) => name.to_string(),
        (None, None) => {
            let model_type = model_type();
            let row = MODEL_TYPES.iter().find(|(known, _)| Some(*known) == model_type.as_deref());
            match (row, model_type) {
                (Some((_, class)), _) => format!("{class}ImageProcessor"),
                (None, Some(model_type)) => {
                    format!("the image processor of model_type {model_type:?}")
                }
                (None, None) => "a file without `image_processor_type`".to_string(),
            }
        }
    };
    let bare = named.strip_suffix("Fast").or_else(|| named.strip_suffix("Pil")).unwrap_or(&named);
    let bare = bare.strip_suffix("ImageProcessor").or_else(|| bare.strip_suffix("FeatureExtractor"));
    CLASSES.iter().find(|class| Some(class.name) == bare).ok_or_else(|| PreprocessError::UnknownType {
        file: fields.file.to_path_buf(),
        found: named,
        known: CLASSES.iter().map(|class| format!("{}ImageProcessor", class.name)).collect(),
    })
}

/// `size`: a number, `[height, width]`, or an object with one of four sets of keys.
fn transformers_size(fields: &Fields<'_>, class: &Class) -> Result<Resize, PreprocessError> {
    let square = fields.flag("default_to_square", class.square)?;
    fields.not_null(&["size"])?;
    match fields.get("size") {
        None => Ok(class.resize),
        Some(Value::Number(_)) if !square => Ok(Resize::ShortestEdge(fields.side("size")?)),
        Some(Value::Object(size)) => {
            let inner = fields.inside("size")?;
            let mut keys: Vec<&str> =
                size.iter().filter(|(_, v)| !v.is_null()).map(|(k, _)| k.as_str()).collect();
            keys.sort_unstable();
            match keys[..] {
                ["height", "width"] => Ok(Resize::Exact([inner.side("height")?, inner.side("width")?])),
                ["shortest_edge"] => Ok(Resize::ShortestEdge(inner.side("shortest_edge")?)),
                ["longest_edge", "shortest_edge"] => Ok(Resize::ShortestEdgeUpTo {
                    shortest: inner.side("shortest_edge")?,
                    longest: inner.side("longest_edge")?,
                }),
                ["max_height", "max_width"] => {
                    Ok(Resize::Within([inner.side("max_height")?, inner.side("max_width")?]))
                }
                _ => Err(fields.wrong(
                    "size",
                    "height and width, shortest_edge (and longest_edge), or max_height and max_width",
                )),
            }
        }
        Some(_) => Ok(Resize::Exact(fields.sides("size")?)),
    }
}

/// open_clip's `image_transform_v2`. Where the file says how large the model's pictures are, that overrides
/// `preprocess_cfg.size`, as `create_model` does it.
fn open_clip(root: Fields<'_>) -> Result<Preprocessor, PreprocessError> {
    let empty = Value::Object(Default::default());
    let fields = root.inside_or("preprocess_cfg", &empty)?;
    let model = root.inside_or("model_cfg", &empty)?;
    let vision = model.inside_or("vision_cfg", &empty)?;
    let size = match (vision.get("image_size"), fields.get("size")) {
        (Some(_), _) => vision.sides("image_size")?,
        (None, Some(_)) => fields.sides("size")?,
        (None, None) => [224, 224],
    };
    if !matches!(fields.text("mode")?, None | Some("RGB")) {
        return Err(fields.wrong("mode", "\"RGB\""));
    }
    let filter = match fields.text("interpolation")? {
        None | Some("bicubic" | "random" | "") => Filter::Bicubic,
        Some("bilinear") => Filter::Bilinear,
        Some(_) => return Err(fields.wrong("interpolation", "bicubic, bilinear or random")),
    };
    let fill = match fields.get("fill_color") {
        None => [0; 3],
        Some(Value::Array(_)) => fields.triple("fill_color", [0.0; 3])?.map(|v| v as u8),
        Some(value) => match value.as_u64().and_then(|v| u8::try_from(v).ok()) {
            Some(grey) => [grey; 3],
            None => return Err(fields.wrong("fill_color", "0 to 255")),
        },
    };
    let black = Crop { size, centre: Centre::Nearest, fill: [0; 3] };
    let (resize, filter, crop) = match fields.text("resize_mode")? {
        None | Some("shortest" | "") if size[0] == size[1] => {
            (Resize::ShortestEdge(size[0]), filter, Some(black))
        }
        // Here open_clip forgets to hand its interpolation on.
        None | Some("shortest" | "") => (Resize::Cover(size), Filter::Bicubic, Some(black)),
        Some("longest") => (Resize::Contain(size), filter, Some(Crop { fill, ..black })),
        Some("squash") => (Resize::Exact(size), filter, None),
        Some(_) => return Err(fields.wrong("resize_mode", "shortest, longest or squash")),
    };
    let normalize = Some(fields.normalize(["mean", "std"], CLIP_MEAN, CLIP_STD)?);
    Ok(Preprocessor { convert: Convert::Last, resize, filter, crop, rescale: Rescale::Over255, normalize })
}

/// timm's `create_transform` for evaluation, on pictures that its data sets have converted to RGB.
fn timm(fields: Fields<'_>) -> Result<Preprocessor, PreprocessError> {
    let size = match fields.get("input_size") {
        None => [224, 224],
        Some(Value::Array(sizes)) if sizes.len() == 3 && sizes[0] == 3 => {
            let side = |i: usize| fields.as_side("input_size", &sizes[i]);
            [side(1)?, side(2)?]
        }
        Some(_) => return Err(fields.wrong("input_size", "[3, height, width]")),
    };
    let filter = match fields.text("interpolation")? {
        None | Some("bicubic" | "") => Filter::Bicubic,
        Some("nearest") => Filter::Nearest,
        Some("bilinear") => Filter::Bilinear,
        Some("box") => Filter::Box,
        Some("hamming") => Filter::Hamming,
        Some("lanczos") => Filter::Lanczos,
        Some(_) => {
            return Err(fields.wrong("interpolation", "nearest, bilinear, bicubic, box, hamming or lanczos"));
        }
    };
    let crop_pct = match fields.number("crop_pct", 0.875)? {
        0.0 => 0.875,
        crop_pct => crop_pct,
    };
    let scaled = size.map(|side| (side as f64 / crop_pct).floor());
    if !scaled.iter().all(|side| (1.0..=MAX_SIDE as f64).contains(side)) {
        return Err(fields.wrong("crop_pct", &format!("a share that scales to 1 to {MAX_SIDE} pixels")));
    }
    let scaled = scaled.map(|side| side as usize);
    let mean = fields.triple("mean", IMAGENET_MEAN)?;
    let black = Crop { size, centre: Centre::Nearest, fill: [0; 3] };
    let (resize, crop) = match fields.text("crop_mode")? {
        None | Some("center" | "") if scaled[0] == scaled[1] => (Resize::ShortestEdge(scaled[0]), black),
        None | Some("center" | "") => (Resize::Cover(scaled), black),
        Some("squash") => (Resize::Exact(scaled), black),
        Some("border") => {
            let fill = mean.map(|v| (255.0 * v).round_ties_even() as u8);
            (Resize::Contain(scaled), Crop { fill, ..black })
        }
        Some(_) => return Err(fields.wrong("crop_mode", "center, squash or border")),
    };
    let normalize = Some(fields.normalize(["mean", "std"], IMAGENET_MEAN, IMAGENET_STD)?);
    let convert = Convert::First(Background::DropAlpha);
    Ok(Preprocessor { convert, resize, filter, crop: Some(crop), rescale: Rescale::Over255, normalize })
}

/// The fields of one object in a file. A null field counts as absent, as in open_clip and timm.
struct Fields<'a> {
    file: &'a Path,
    /// Where the object is, dotted; empty at the root.
    path: String,
    json: &'a Value,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn dotted(&self, key: &str) -> String {
        match (self.path.as_str(), key) {
            ("", key) => key.to_string(),
            (path, key) => format!("{path}.{key}"),
        }
    }

    fn wrong(&self, key: &str, expected: &str) -> PreprocessError {
        let value = if key.is_empty() { Some(self.json) } else { self.get(key) };
        let mut found = value.map_or("nothing".to_string(), Value::to_string);
        if found.chars().count() > 80 {
            found = found.chars().take(80).chain(['…']).collect();
        }
        let (file, field) = (self.file.to_path_buf(), self.dotted(key));
        PreprocessError::Field { file, field, expected: expected.to_string(), found }
    }

    fn inside(&self, key: &str) -> Result<Fields<'a>, PreprocessError> {
        match self.get(key) {
            Some(json @ Value::Object(_)) => Ok(Fields { file: self.file, path: self.dotted(key), json }),
            _ => Err(self.wrong(key, "an object")),
        }
    }

    fn inside_or<'b>(&self, key: &str, absent: &'b Value) -> Result<Fields<'b>, PreprocessError>
    where
        'a: 'b,
    {
        match self.get(key) {
            None => Ok(Fields { file: self.file, path: self.dotted(key), json: absent }),
            Some(_) => self.inside(key),
        }
    }

    fn not_null(&self, keys: &[&str]) -> Result<(), PreprocessError> {
        match keys.iter().find(|key| self.json.get(key) == Some(&Value::Null)) {
            Some(key) => Err(self.wrong(key, "a value, or no such field")),
            None => Ok(()),
        }
    }

    /// A flag of transformers, where null means no.
    fn flag(&self, key: &str, absent: bool) -> Result<bool, PreprocessError> {
        match self.json.get(key) {
            None => Ok(absent),
            Some(Value::Null) => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, PreprocessError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string")),
        }
    }

    fn number(&self, key: &str, absent: f64) -> Result<f64, PreprocessError> {
        match self.get(key) {
            None => Ok(absent),
            Some(value) => value.as_f64().ok_or_else(|| self.wrong(key, "a number")),
        }
    }

    fn as_side(&self, key: &str, value: &Value) -> Result<usize, PreprocessError> {
        match value.as_u64() {
            Some(side @ 1..) if side <= MAX_SIDE as u64 => Ok(side as usize),
            _ => Err(self.wrong(key, &format!("1 to {MAX_SIDE} pixels"))),
        }
    }

    fn side(&self, key: &str) -> Result<usize, PreprocessError> {
        self.as_side(key, self.get(key).unwrap_or(&Value::Null))
    }

    /// `[height, width]` from one number for both, or a list of two.
    fn sides(&self, key: &str) -> Result<[usize; 2], PreprocessError> {
        match self.get(key) {
            Some(Value::Array(sides)) => match &sides[..] {
                [height, width] => Ok([self.as_side(key, height)?, self.as_side(key, width)?]),
                _ => Err(self.wrong(key, "a number, or [height, width]")),
            },
            _ => self.side(key).map(|side| [side, side]),
        }
    }

    /// Three numbers, or one for all three.
    fn triple(&self, key: &str, absent: [f64; 3]) -> Result<[f64; 3], PreprocessError> {
        let wrong = || self.wrong(key, "one number or three");
        let numbers: Option<Vec<f64>> = match self.get(key) {
            None => return Ok(absent),
            Some(Value::Array(values)) => values.iter().map(Value::as_f64).collect(),
            Some(value) => value.as_f64().map(|v| vec![v]),
        };
        match numbers.ok_or_else(wrong)?[..] {
            [v] => Ok([v; 3]),
            [r, g, b] => Ok([r, g, b]),
            _ => Err(wrong()),
        }
    }

    fn normalize(
        &self,
        [mean, std]: [&str; 2],
        absent_mean: [f64; 3],
        absent_std: [f64; 3],
    ) -> Result<Normalize, PreprocessError> {
        let single = |values: [f64; 3]| values.map(|v| v as f32);
        let normalize = Normalize {
            mean: single(self.triple(mean, absent_mean)?),
            std: single(self.triple(std, absent_std)?),
        };
        if normalize.std.contains(&0.0) {
            return Err(self.wrong(std, "numbers other than zero"));
        }
        Ok(normalize)
    }
}
