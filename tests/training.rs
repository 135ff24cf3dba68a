//! A run that is stopped and goes on is the run that was never stopped.

use std::ops::ControlFlow;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tolerance};
use volary::Clip;
use volary::clip::{ClipConfig, ClipModel, Pooling, TextConfig, TransformerConfig, VisionConfig, VitConfig};
use volary::folder::Folder;
use volary::llama::LlamaConfig;
use volary::pretrained::{EMOJI_CLIP, EMOJI_DRAW};
use volary::recipe::clip_folder::{export, tokenizer};
use volary::recipe::contrastive::{Job, Outcome, Recipe, train};
use volary::recipe::data::{Dataset, Gallery, Style};
use volary::recipe::descent::Descent;
use volary::recipe::drawing;
use volary::recipe::load::Load;
use volary::recipe::mim;
use volary::recipe::moe_chars::{self, Router, Texts, Twin};
use volary::recipe::named_shapes::{self, Asked, SHAPES_CLIP};
use volary::recipe::run::TrainError;
use volary::recipe::segmentation;
use volary::recipe::shapes::Part;
use volary::token_drawing::{DrawSettings, Plan, TokenDrawing, TokenDrawingConfig};
use volary_kernels::layers::Embedding;
use volary_kernels::ops::Activation;
use volary_kernels::random::seeded;
use volary_text::generate::Sampling;
use volary_vision::autoencoder::CodecConfig;
use volary_vision::resnet::ResNetConfig;
use volary_vision::vq::{VqConfig, VqModel};
use volary_weights::LoadOptions;

use crate::support::fixture;

const STEPS: usize = 6;

fn recipe() -> Recipe {
    Recipe {
        steps: STEPS,
        batch: 12,
        accumulate: 2,
        warmup: 2,
        bank_period: 3,
        checkpoint_every: 2,
        evaluate_every: 1000,
        ..Recipe::default()
    }
}

fn config(vocab_size: usize, end: i64) -> ClipConfig {
    let transformer = TransformerConfig {
        d_model: 16,
        d_ff: 32,
        n_layers: 1,
        n_heads: 2,
        activation: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    };
    ClipConfig {
        vision: VisionConfig::ResNet(ResNetConfig {
            image_size: 64,
            width: 4,
            layers: [1, 1, 1, 1],
            n_heads: 2,
            d_embed: 16,
        }),
        text: TextConfig { context_length: 24, vocab_size, transformer, pooling: Pooling::First(end) },
        d_embed: 16,
    }
}

/// The sample's pictures as training data.
fn data() -> Dataset {
    let gallery = Gallery::read(&fixture("emoji_sample"), |_| true).unwrap().remove(0);
    let opaque = |rgb: &[u8]| [rgb[0], rgb[1], rgb[2], 255];
    let pixels = gallery
        .pictures
        .iter()
        .flat_map(|picture| picture.pixels().chunks_exact(3).flat_map(opaque))
        .collect();
    let style = Style { name: "sample".into(), pixels, concepts: gallery.targets };
    Dataset { size: 64, concepts: gallery.concepts, styles: vec![style] }
}

fn run(data: &Dataset, folder: &Path, recipe: &Recipe, until: usize) -> Result<Vec<f32>, TrainError> {
    Ok(run_from(None, data, folder, recipe, until)?.losses)
}

fn run_from(
    init: Option<&ClipModel>,
    data: &Dataset,
    folder: &Path,
    recipe: &Recipe,
    until: usize,
) -> Result<Outcome, TrainError> {
    let tokenizer = tokenizer(data, &EMOJI_CLIP, None, folder).unwrap();
    train(&Job {
        recipe,
        config: &config(tokenizer.vocab_size(), i64::from(tokenizer.sep_id().unwrap())),
        init,
        data,
        development: &[],
        tokenizer: &tokenizer,
        preprocessor: &EMOJI_CLIP.preprocessor().unwrap(),
        folder,
        until,
        device: &Device::flex(),
    })
}

#[test]
fn a_run_resumes_at_any_step() {
    let data = data();
    let unbroken = tempfile::tempdir().unwrap();
    let expected = run(&data, unbroken.path(), &recipe(), STEPS).unwrap();
    assert_eq!(expected.len(), STEPS);
    for stop in 1..STEPS {
        let broken = tempfile::tempdir().unwrap();
        run(&data, broken.path(), &recipe(), stop).unwrap();
        let resumed = run(&data, broken.path(), &recipe(), STEPS).unwrap();
        for (step, (a, b)) in resumed.iter().zip(&expected).enumerate() {
            assert!((a - b).abs() < 1e-4, "stopped at {stop}: step {step} has {a}, unbroken {b}");
        }
        assert_eq!(resumed.len(), STEPS);
    }
}

/// Killed while a checkpoint was being written: the one before counts, and what was half-written does not.
#[test]
fn a_kill_while_saving_loses_no_checkpoint() {
    let data = data();
    let unbroken = tempfile::tempdir().unwrap();
    let expected = run(&data, unbroken.path(), &recipe(), STEPS).unwrap();

    let half_written = tempfile::tempdir().unwrap();
    run(&data, half_written.path(), &recipe(), 3).unwrap();
    let fresh = half_written.path().join("checkpoint.new");
    std::fs::create_dir(&fresh).unwrap();
    std::fs::write(fresh.join("model.bpk"), "half of a model").unwrap();

    let between_the_names = tempfile::tempdir().unwrap();
    run(&data, between_the_names.path(), &recipe(), 3).unwrap();
    let at = |name: &str| between_the_names.path().join(name);
    let _ = std::fs::remove_dir_all(at("checkpoint.old"));
    std::fs::rename(at("checkpoint"), at("checkpoint.old")).unwrap();

    for folder in [&half_written, &between_the_names] {
        let resumed = run(&data, folder.path(), &recipe(), STEPS).unwrap();
        for (a, b) in resumed.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-4, "{resumed:?} {expected:?}");
        }
        assert_eq!(resumed.len(), STEPS);
    }
}

#[test]
fn other_settings_are_refused() {
    let data = data();
    let folder = tempfile::tempdir().unwrap();
    run(&data, folder.path(), &recipe(), 2).unwrap();
    let other = Recipe { batch: 10, ..recipe() };
    assert!(matches!(run(&data, folder.path(), &other, STEPS), Err(TrainError::OtherRun { .. })));
}

#[test]
fn a_run_goes_on_for_longer_than_it_was_planned() {
    let data = data();
    let folder = tempfile::tempdir().unwrap();
    let planned = run(&data, folder.path(), &recipe(), STEPS).unwrap();
    let longer = Recipe { steps: STEPS + 2, ..recipe() };
    let losses = run(&data, folder.path(), &longer, longer.steps).unwrap();
    assert_eq!(losses.len(), STEPS + 2);
    assert_eq!(losses[..STEPS], planned);
}

#[test]
fn a_run_starts_from_given_weights() {
    let data = data();
    let recipe = Recipe { steps: 30, warmup: 5, checkpoint_every: 1000, learning_rate: 3e-3, ..recipe() };
    let [first, second] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let trained = run_from(None, &data, first.path(), &recipe, recipe.steps).unwrap();
    let resumed = run_from(Some(&trained.model), &data, second.path(), &recipe, 3).unwrap();
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    assert!(mean(&resumed.losses) < mean(&trained.losses[..3]) - 0.1, "{:?}", resumed.losses);
}

#[test]
fn the_loss_goes_down() {
    let data = data();
    let folder = tempfile::tempdir().unwrap();
    let recipe = Recipe { steps: 40, warmup: 5, checkpoint_every: 1000, learning_rate: 3e-3, ..recipe() };
    let losses = run(&data, folder.path(), &recipe, recipe.steps).unwrap();
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    assert!(mean(&losses[30..]) < mean(&losses[..10]) - 0.1, "{losses:?}");
}

/// AltCLIP's two stages at the size of a toy: texts take a teacher's vectors, then meet pictures, which stay as they are.
#[test]
fn a_tower_for_texts_learns_from_a_teacher_and_then_from_pictures() {
    use burn::optim::{AdamWConfig, GradientsParams};
    use burn::tensor::{Int, Tensor};
    use volary::altclip::AltClipConfig;
    use volary::clip::normalise;
    use volary_multimodal::contrastive::locked_info_nce;
    use volary_multimodal::distillation::teacher_mse;

    let device = Device::flex().autodiff();
    let folder = Folder::Disk(fixture("altclip"));
    let config = AltClipConfig::of(&folder).unwrap();
    let mut model = config.load(&folder, &volary_weights::LoadOptions::default(), &device).unwrap();
    let ids: Vec<i64> = (0..4).flat_map(|text| [0, 10 + text, 20 + text * 3, 2]).collect();
    let ids = Tensor::<1, Int>::from_data(ids.as_slice(), &device).reshape([4, 4]);
    // a wave per text
    let wave = |text: usize| (0..config.text.d_teacher).map(move |at| ((at * (text + 1)) as f32 * 0.7).sin());
    let vectors: Vec<f32> = (0..4).flat_map(wave).collect();
    let teacher = Tensor::<1>::from_data(vectors.as_slice(), &device).reshape([4, config.text.d_teacher]);
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..40 {
        let student = model.text.sentence(&model.text.forward(ids.clone()));
        let loss = teacher_mse(student, teacher.clone());
        losses.push(loss.clone().into_scalar::<f32>());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.01, model, gradients);
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < 0.1 * first, "{first} to {last}");

    let size = config.vision.image_size;
    let pixels = Tensor::<1, Int>::arange(0..(4 * 3 * size * size) as i64, &device).float();
    let pixels = (pixels * 0.37).sin().reshape([4, 3, size, size]);
    let loss = |model: &volary::altclip::AltClip| {
        let images = normalise(model.vision.forward(pixels.clone()).embedding);
        let texts = normalise(model.text.embed(ids.clone()));
        locked_info_nce(images, texts, model.logit_scale.val().exp())
    };
    let gradients = loss(&model).backward();
    assert!(model.vision.patches.weight.val().grad(&gradients).is_none());
    assert!(model.text.projection.weight.val().grad(&gradients).is_some());
    let before: f32 = loss(&model).into_scalar();
    for _ in 0..20 {
        let gradients = GradientsParams::from_grads(loss(&model).backward(), &model);
        model = optimizer.step(0.01, model, gradients);
    }
    let after: f32 = loss(&model).into_scalar();
    assert!(after < 0.5 * before, "{before} to {after}");
}

/// A few steps lower the loss, and what is written can be loaded and asked.
#[test]
fn the_toy_segmenter_learns_and_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let recipe = Descent { steps: 12, batch: 4, ..segmentation::RECIPE };
    let outcome = segmentation::train(&recipe, scratch.path(), &Device::flex()).unwrap();
    let losses = &outcome.losses;
    assert_eq!(losses.len(), 12);
    let [first, last] = [&losses[..3], &losses[9..]].map(|losses| losses.iter().sum::<f32>());
    assert!(last < 0.9 * first, "{losses:?}");
    assert!(scratch.path().join("loss.svg").is_file());
    for examples in [1, 2] {
        let overlap =
            segmentation::evaluate(&outcome.folder, Part::Unseen, examples, 2, 5, &Device::flex()).unwrap();
        assert!((0.0..=1.0).contains(&overlap), "{overlap}");
    }
    let sheet = segmentation::sheet(&outcome.folder, Part::Unseen, 2, 5, &Device::flex()).unwrap();
    assert_eq!([sheet.width(), sheet.height()], [4 * 96, 2 * 96]);
}

/// A few steps lower the loss, what is written can be loaded and asked, and asked the same it answers the same.
#[test]
fn the_toy_eva_learns_and_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let recipe = Descent { steps: 12, batch: 4, ..mim::RECIPE };
    let outcome = mim::train(&recipe, scratch.path(), &Device::flex()).unwrap();
    let losses = &outcome.losses;
    assert_eq!(losses.len(), 12);
    let [first, last] = [&losses[..3], &losses[9..]].map(|losses| losses.iter().sum::<f32>() / 3.0);
    assert!(last < first - 0.2, "{losses:?}");
    assert!(scratch.path().join("loss.svg").is_file());
    let evaluate = || mim::evaluate(&outcome.folder, Part::Unseen, 3, 5, &Device::flex()).unwrap();
    let score = evaluate();
    assert_eq!(score, evaluate());
    assert!(score.constant < score.places && score.places <= 1.0, "{score:?}");
    assert!(score.model > 0.2 && score.model < score.places, "{score:?}");
    let sheet = mim::sheet(&outcome.folder, Part::Unseen, 2, 5, &Device::flex()).unwrap();
    assert_eq!([sheet.width(), sheet.height()], [4 * 96, 2 * 96]);
}

fn shapes_config() -> ClipConfig {
    ClipConfig::of(&SHAPES_CLIP).unwrap().0
}

fn shapes_run(
    config: &ClipConfig,
    init: Option<&ClipModel>,
    folder: &Path,
    data: &Dataset,
    recipe: &Recipe,
) -> Outcome {
    let tokenizer = tokenizer(data, &SHAPES_CLIP, None, folder).unwrap();
    let (preprocessor, until) = (SHAPES_CLIP.preprocessor().unwrap(), recipe.steps);
    let device = Device::flex();
    let (tokenizer, preprocessor, device, development) = (&tokenizer, &preprocessor, &device, &[][..]);
    train(&Job { recipe, config, init, data, development, tokenizer, preprocessor, folder, until, device })
        .unwrap()
}

/// In chunks of any size, beside each other or not, a run is the one whose batches are computed in one go; also with patches
/// left out, which makes another run. Batch norms take a chunk's statistics: there the one chunk is the batch.
#[test]
fn chunks_change_no_step() {
    let data = named_shapes::learned(2, 1);
    let convolutional = shapes_config();
    let transformer = convolutional.text.transformer.clone();
    let vision = VisionConfig::Vit(VitConfig { image_size: 32, patch_size: 8, transformer });
    let vit = ClipConfig { vision, ..convolutional.clone() };
    let recipe =
        Recipe { steps: 3, batch: 10, accumulate: 1, chunk: None, warmup: 1, ..named_shapes::recipe() };
    let chunks = &[(3, 2), (10, 1)];
    let cases = [(&vit, 0.0, &chunks[..]), (&vit, 0.5, chunks), (&convolutional, 0.0, &chunks[1..])];
    for (config, patch_dropout, chunks) in cases {
        let run = |init, recipe: &Recipe| {
            let folder = tempfile::tempdir().unwrap();
            shapes_run(config, init, folder.path(), &data, recipe)
        };
        // other tests draw from the device's random numbers too: all runs start from one model
        let start = run(None, &Recipe { steps: 1, ..recipe.clone() }).model;
        let losses = |chunk, accumulate| {
            run(Some(&start), &Recipe { chunk, accumulate, patch_dropout, ..recipe.clone() }).losses
        };
        let whole = losses(None, 1);
        for &(chunk, accumulate) in chunks {
            let chunked = losses(Some(chunk), accumulate);
            for (a, b) in chunked.iter().zip(&whole) {
                assert!((a - b).abs() < 1e-4, "{chunk} pairs at once: {chunked:?}, all of them: {whole:?}");
            }
        }
        if patch_dropout > 0.0 {
            let seeing = run(Some(&start), &recipe).losses;
            assert!((seeing[0] - whole[0]).abs() > 1e-4, "{seeing:?} {whole:?}");
        }
    }
}

#[test]
fn a_convolutional_tower_has_no_patches_to_leave_out() {
    let data = data();
    let folder = tempfile::tempdir().unwrap();
    let recipe = Recipe { patch_dropout: 0.5, ..recipe() };
    assert!(matches!(run(&data, folder.path(), &recipe, STEPS), Err(TrainError::NoPatches)));
}

/// A few steps lower the loss, and what is written can be loaded and asked.
#[test]
fn the_toy_clip_learns_and_is_written() {
    let data = named_shapes::learned(4, 1);
    let scratch = tempfile::tempdir().unwrap();
    let recipe = Recipe { steps: 16, batch: 16, warmup: 2, ..named_shapes::recipe() };
    let outcome = shapes_run(&shapes_config(), None, scratch.path(), &data, &recipe);
    let [first, last] =
        [&outcome.losses[..4], &outcome.losses[12..]].map(|losses| losses.iter().sum::<f32>() / 4.0);
    assert!(last < first - 0.5, "{:?}", outcome.losses);
    let folder = scratch.path().join("export");
    export(&outcome.model, &SHAPES_CLIP, &scratch.path().join("tokenizer.json"), &folder).unwrap();
    let clip = Clip::in_folder(Folder::Disk(folder)).load(&Device::flex()).unwrap();
    for (asked, pictures) in [(Asked::All, 96), (Asked::Unseen, 16)] {
        let scores = named_shapes::scores(&clip, asked, 2, 5).unwrap();
        assert_eq!(scores.iter().map(|score| score.pictures).collect::<Vec<_>>(), [pictures; 2]);
    }
}

/// Shapes of a model that draws, and the size of a toy.
fn drawer() -> TokenDrawingConfig {
    let shape = TokenDrawingConfig::of(&EMOJI_DRAW).unwrap();
    let codec = CodecConfig { channels: vec![8, 8, 8].into(), d_latent: 8, ..shape.vq.codec };
    let vq = VqConfig { codec, n_codes: 16, d_code: 4, ..shape.vq };
    let transformer = LlamaConfig {
        d_model: 16,
        d_ff: 16,
        n_layers: 1,
        n_heads: 2,
        n_kv_heads: 2,
        d_head: 8,
        ..shape.transformer
    };
    TokenDrawingConfig { vq, transformer, plan: Plan { n_codes: 16, ..shape.plan } }
}

/// Both runs with so many steps; the schedule of the first two does not depend on it.
fn draw_run(data: &Dataset, folder: &Path, steps: usize) -> (TokenDrawing, [Vec<f32>; 2]) {
    let (device, shape) = (Device::flex(), drawer());
    let settings = |recipe: drawing::Recipe| drawing::Recipe { steps, batch: 4, warmup: 2, ..recipe };
    let [codes, decoder] = ["codes", "decoder"].map(|name| folder.join(name));
    let vq =
        drawing::train_codes(&settings(drawing::Recipe::codes()), &shape, data, &codes, &device).unwrap();
    let tokenizer = EMOJI_CLIP.tokenizer().unwrap();
    let drawn = drawing::Drawn { data, vq: &vq, tokenizer: &tokenizer, plan: &shape.plan };
    let recipe = settings(drawing::Recipe::decoder());
    let transformer = drawing::train_decoder(&recipe, &shape.transformer, &drawn, &decoder, &device).unwrap();
    let losses = [codes, decoder].map(|folder| {
        let losses = std::fs::read_to_string(folder.join("checkpoint/losses.csv")).unwrap();
        losses.lines().map(|line| line.split_once(',').unwrap().1.parse().unwrap()).collect()
    });
    (TokenDrawing { vq, transformer, tokenizer, plan: shape.plan }, losses)
}

#[test]
fn a_run_that_learns_to_draw_resumes() {
    let data = data();
    let [unbroken, broken] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (_, expected) = draw_run(&data, unbroken.path(), 2);
    let (_, resumed) = draw_run(&data, broken.path(), 2);
    assert_eq!(resumed, expected, "the same seed");
    let (drawer, resumed) = draw_run(&data, broken.path(), 4);
    assert!(
        resumed
            .iter()
            .zip(&expected)
            .all(|(resumed, expected)| resumed.len() == 4 && resumed[..2] == expected[..])
    );

    let settings = |seed| {
        let sampling = Sampling { seed, ..DrawSettings::default().sampling };
        DrawSettings { guidance: 2.0, sampling, count: 2 }
    };
    let draw = |captions: &[&str], seed| {
        drawer.draw(captions, "", &settings(seed), &mut |_| ControlFlow::Continue(())).unwrap()
    };
    let both = draw(&["a cat", "一只狗"], 1);
    assert_eq!((both.len(), both[0].len(), both[0][0].width(), both[0][0].height()), (2, 2, 64, 64));
    assert_eq!(draw(&["一只狗"], 1)[0], both[1], "a drawing depends on its caption and seed alone");
    assert_ne!(draw(&["一只狗"], 2)[0], both[1]);
    assert_ne!(both[1][0], both[1][1]);
}

/// What is written is what is read.
#[test]
fn a_drawer_s_folder_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let (device, shape) = (Device::flex(), TokenDrawingConfig::of(&EMOJI_DRAW).unwrap());
    let vq = seeded(1, &device, |device| shape.vq.init(device));
    let transformer = seeded(1, &device, |device| shape.transformer.init(device));
    assert_eq!(vq.num_params() + transformer.num_params(), 5_561_076, "below 12 MB in f16");
    drawing::export(&vq, &transformer, &EMOJI_DRAW, folder.path()).unwrap();
    let read =
        TokenDrawing::load(&Folder::Disk(folder.path().into()), &LoadOptions::default(), &device).unwrap();
    assert_eq!(read.plan, shape.plan);
    let weight = |vq: &VqModel| vq.codebook.weight.val().into_data().convert::<f32>();
    weight(&read.vq).assert_approx_eq::<f32>(&weight(&vq), Tolerance::absolute(1e-6));
    std::fs::remove_dir_all(folder.path().join("vqvae")).unwrap();
    let missing = TokenDrawing::load(&Folder::Disk(folder.path().into()), &LoadOptions::default(), &device);
    assert!(missing.err().unwrap().to_string().contains("vqvae"));
}

/// Runs that begin side by side do not take each other's numbers.
#[test]
fn a_seed_s_weights_are_its_own() {
    let weights = |seed: u64| {
        let model = seeded(seed, &Device::flex(), |device| Embedding::new(40, 30, 1.0, device));
        model.weight.val().into_data().iter::<f32>().collect::<Vec<_>>()
    };
    let alone = [weights(1), weights(2)];
    assert_ne!(alone[0], alone[1]);
    std::thread::scope(|scope| {
        // nobody waits for this one
        scope.spawn(|| {
            for _ in 0..200 {
                Embedding::new(40, 30, 1.0, &Device::flex()).weight.val();
            }
        });
        let drawn = |seed: u64| (0..20).map(|_| weights(seed)).collect::<Vec<_>>();
        let both = [1, 2].map(|seed| scope.spawn(move || drawn(seed)));
        for (drawn, alone) in both.into_iter().zip(&alone) {
            assert!(drawn.join().unwrap().iter().all(|drawn| drawn == alone));
        }
    });
}

/// Both twins go on where they were stopped, with what their experts got so far.
#[test]
fn twins_resume_at_any_step() {
    let shape = moe_chars::Shape {
        n_layers: 2,
        d_model: 8,
        n_heads: 2,
        d_ff: 8,
        n_experts: 4,
        router: Router::Switch,
    };
    let recipe =
        moe_chars::Recipe { shape, steps: 4, batch: 5, seq: 12, checkpoint_every: 2, ..Default::default() };
    let (texts, device) = (Texts::embedded(), Device::flex());
    let run = |recipe: &moe_chars::Recipe, twin, folder: &Path, until| {
        moe_chars::train(recipe, twin, &texts, folder, until, &device)
    };
    for twin in Twin::ALL {
        let unbroken = tempfile::tempdir().unwrap();
        let expected = run(&recipe, twin, unbroken.path(), 4).unwrap();
        for stop in [1, 2, 3] {
            let broken = tempfile::tempdir().unwrap();
            let before = run(&recipe, twin, broken.path(), stop).unwrap();
            let resumed = run(&recipe, twin, broken.path(), 4).unwrap();
            assert_eq!(resumed.losses.len(), 4);
            assert_eq!(resumed.loads.steps(), expected.loads.steps());
            assert!(resumed.loads.csv().starts_with(&before.loads.csv()));
            for (a, b) in resumed.losses.iter().zip(&expected.losses) {
                assert!((a - b).abs() < 1e-4, "{:?} {:?}", resumed.losses, expected.losses);
            }
        }
        let drawn = std::fs::read_to_string(unbroken.path().join("load.svg"));
        match twin {
            Twin::Dense => assert!(expected.loads.steps() == 0 && drawn.is_err()),
            Twin::Experts => {
                // 60 bytes of a step, in each of two layers
                let choices = |load: &Load| load.experts.iter().sum::<usize>() + load.dropped;
                let newest: Vec<usize> = expected.loads.newest(1).iter().map(choices).collect();
                assert_eq!((expected.loads.steps(), newest), (4, vec![60, 60]));
                assert!(drawn.unwrap().contains("layer 1"));
            }
        }
        let other = moe_chars::Recipe { seed: 2, ..recipe.clone() };
        assert!(matches!(run(&other, twin, unbroken.path(), 4), Err(TrainError::OtherRun { .. })));
    }
}
