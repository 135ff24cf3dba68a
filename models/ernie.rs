//! ERNIE: BERT with an embedding of the task that a text belongs to (Baidu; ERNIE 2.0, Sun et al. 2019,
//! <https://arxiv.org/abs/1907.12412>), in the sizes that were distilled from ERNIE 3.0 and released.
//!
//! The numbers match `transformers` (`ErnieModel`) and PaddleNLP (`ErnieModel`, `ErnieForMaskedLM`); which of the two
//! a folder is for, the names of its weights tell. PaddleNLP adds 1e-12 to variances whatever the configuration says,
//! and gives padding the zero vector; transformers does neither. The large ERNIE 3.0 is another model, see [`crate::ernie3`].
//!
//! ```sh
//! volary forward path/to/ernie-3.0-base-zh --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use volary_kernels::layers::Embedding;
use volary_weights::{Checkpoint, KeyMap, Rule};

use Rule::{Ignore, Rename, Transpose, Under};

use crate::bert::{self, Bert, BertConfig, BertInput, BertOutput};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ErnieConfig {
    /// All but the tasks.
    pub bert: BertConfig,
    /// The tasks that a token may belong to, if they are told apart.
    pub tasks: Option<Tasks>,
    /// The token whose vector is zero whatever the table holds: Paddle looks padding up so.
    pub padding: Option<usize>,
}

/// The tasks that a token may belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tasks {
    /// How many there are.
    pub count: usize,
    /// The one that is meant where none is given.
    pub default: usize,
}

/// Whose names a folder's weights have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `ErnieModel` of `transformers`.
    Transformers,
    /// `ErnieModel` of PaddleNLP, which stores projections as `[d_in, d_out]`.
    Paddle,
}

/// An encoder.
#[derive(Module, Debug)]
pub struct Ernie {
    /// The encoder without tasks.
    pub bert: Bert,
    /// `[n_tasks, d_model]`.
    pub tasks: Option<Embedding>,
    #[module(skip)]
    default_task: usize,
    #[module(skip)]
    padding: Option<usize>,
}

/// A batch of texts. One without more than ids is `ids.into()`.
#[derive(Clone, Debug)]
pub struct ErnieInput {
    /// All but the tasks.
    pub bert: BertInput,
    /// The task of each token, `[batch, seq]`; the configuration's one when `None`.
    pub tasks: Option<Tensor<2, Int>>,
}

impl From<Tensor<2, Int>> for ErnieInput {
    fn from(ids: Tensor<2, Int>) -> Self {
        Self { bert: ids.into(), tasks: None }
    }
}

impl ErnieConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Ernie {
        let table = |tasks: Tasks| Embedding::new(tasks.count, self.bert.d_model, 0.02, device);
        Ernie {
            bert: self.bert.init(device),
            tasks: self.tasks.map(table),
            default_task: self.tasks.map_or(0, |tasks| tasks.default),
            padding: self.padding,
        }
    }
}

impl Ernie {
    /// Encodes a batch of texts.
    ///
    /// # Panics
    /// If an id, a type, a task or a position is outside its table, or shapes differ.
    pub fn forward(&self, input: impl Into<ErnieInput>) -> BertOutput {
        let input = input.into();
        let hidden = self.bert.encode(self.embed(&input), &input.bert.mask);
        BertOutput { pooled: self.bert.pool(&hidden), hidden }
    }

    /// The embeddings of a batch of texts after their norm, `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// As [`Ernie::forward`].
    pub fn embed(&self, input: &ErnieInput) -> Tensor<3> {
        let ErnieInput { bert: input, tasks } = input;
        let words = self.bert.tokens.forward(input.ids.clone()); // [batch, seq, d_model]
        let words = match self.padding {
            Some(padding) => {
                let hidden = input.ids.clone().equal_elem(padding as i64).unsqueeze_dim::<3>(2);
                words.clone().mask_fill(hidden.expand(words.dims()), 0.0)
            }
            None => words,
        };
        let x = self.bert.embed(words, input);
        let x = match &self.tasks {
            Some(table) => {
                let tasks = tasks.clone();
                x + table.forward(tasks.unwrap_or_else(|| input.ids.full_like(self.default_task as i64)))
            }
            None => x,
        };
        self.bert.norm.forward(x)
    }
}

/// The `model_type`s of this shape.
pub(crate) const FAMILIES: &[&str] = &["ernie", "ernie3"];

impl ErnieConfig {
    /// The configuration of a folder, and whose names its weights have. Whether there are a pooler and a masked-LM
    /// head, only the weights tell.
    ///
    /// # Errors
    /// If the configuration is missing, malformed, or asks for what is not built, or there are no weights.
    pub fn of(folder: &Folder) -> Result<(Self, Layout), Error> {
        Ok(Self::fitted(&folder.config("config.json")?, folder.checkpoint()?.as_ref())?)
    }

    /// As [`ErnieConfig::of`], of what a folder holds.
    ///
    /// # Errors
    /// As [`ErnieConfig::parse`].
    pub fn fitted(config: &Config, checkpoint: &dyn Checkpoint) -> Result<(Self, Layout), ConfigError> {
        let has = |key: &str| {
            let is = |name: &str| name.strip_prefix(PREFIX).unwrap_or(name) == key;
            checkpoint.entries().iter().any(|entry| is(&entry.name))
        };
        let (layout, head) = match has("embeddings.layer_norm.weight") {
            true => (Layout::Paddle, ["cls.predictions.transform.weight", "cls.predictions.decoder_bias"]),
            false => {
                (Layout::Transformers, ["cls.predictions.transform.dense.weight", "cls.predictions.bias"])
            }
        };
        let head = head.iter().all(|key| has(key)) && config.flag_or("tie_word_embeddings", true)?;
        let parsed = Self::parse(config, layout)?;
        let bert = BertConfig { pooler: has("pooler.dense.weight"), head, ..parsed.bert };
        Ok((Self { bert, ..parsed }, layout))
    }

    /// `config.json` of `transformers` or PaddleNLP; what it leaves out has the values of their `ErnieConfig`s.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config, layout: Layout) -> Result<Self, ConfigError> {
        let is_known = config.text("model_type").is_some_and(|family| FAMILIES.contains(&family));
        if !is_known {
            return Err(config.error("model_type", &FAMILIES.join(", ")));
        }
        let bert = BertConfig::shape(config, &bert::BASE)?;
        let bert = match layout {
            Layout::Transformers => bert,
            Layout::Paddle => BertConfig { layer_norm_eps: 1e-12, ..bert }, // of its code, whatever is configured
        };
        let tasks = match config.flag_or("use_task_id", false)? {
            true => {
                let count = config.size_or("task_type_vocab_size", 3)?;
                let default = usize::try_from(config.integer_or("task_id", 0)?).ok().filter(|&id| id < count);
                let expected = format!("a task, 0 to {}", count - 1);
                Some(Tasks { count, default: default.ok_or_else(|| config.error("task_id", &expected))? })
            }
            false => None,
        };
        let padding = match layout {
            Layout::Transformers => None,
            Layout::Paddle => usize::try_from(config.integer_or("pad_token_id", 0)?).ok(),
        };
        Ok(Self { bert, tasks, padding })
    }
}

const PREFIX: &str = "ernie.";

const TASKS: Rule = Rename("embeddings.task_type_embeddings.weight", "tasks.weight");

/// Keys of transformers' `ErnieModel`.
pub const KEYS: KeyMap =
    KeyMap::new(&[Under("", "bert.", bert::TRUNK), TASKS, Ignore("cls.{*}")]).with_prefixes(&[PREFIX]);

/// Keys of transformers' `ErnieForMaskedLM` and `ErnieForPreTraining`.
pub const KEYS_WITH_HEAD: KeyMap = KeyMap::new(&[
    Under("", "bert.", bert::TRUNK),
    TASKS,
    Under("cls.predictions.", "bert.head.", bert::BERT_HEAD),
    Ignore("cls.seq_relationship.{*}"),
])
.with_prefixes(&[PREFIX]);

const NAMED: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// Paddle stores a projection as `[d_in, d_out]`.
const LINEAR: &[Rule] = &[Transpose("weight", "weight"), Rename("bias", "bias")];

const PADDLE_BLOCK: &[Rule] = &[
    Under("self_attn.q_proj.", "attention.query.", LINEAR),
    Under("self_attn.k_proj.", "attention.key.", LINEAR),
    Under("self_attn.v_proj.", "attention.value.", LINEAR),
    Under("self_attn.out_proj.", "attention.output.", LINEAR),
    Under("norm1.", "norm1.", NAMED),
    Under("linear1.", "mlp.up.", LINEAR),
    Under("linear2.", "mlp.down.", LINEAR),
    Under("norm2.", "norm2.", NAMED),
];

const PADDLE_TRUNK: &[Rule] = &[
    Rename("embeddings.word_embeddings.weight", "bert.tokens.weight"),
    Rename("embeddings.position_embeddings.weight", "bert.positions.weight"),
    Rename("embeddings.token_type_embeddings.weight", "bert.token_types.weight"),
    TASKS,
    Under("embeddings.layer_norm.", "bert.norm.", NAMED),
    Under("encoder.layers.{}.", "bert.blocks.{}.", PADDLE_BLOCK),
    Under("pooler.dense.", "bert.pooler.", LINEAR),
];

/// Keys of PaddleNLP's `ErnieModel`.
pub const PADDLE_KEYS: KeyMap =
    KeyMap::new(&[Under("", "", PADDLE_TRUNK), Ignore("cls.{*}"), Ignore("classifier.{*}")])
        .with_prefixes(&[PREFIX]);

/// Keys of PaddleNLP's `ErnieForMaskedLM` and `ErnieForPretraining`.
pub const PADDLE_KEYS_WITH_HEAD: KeyMap = KeyMap::new(&[
    Under("", "", PADDLE_TRUNK),
    Under("cls.predictions.transform.", "bert.head.transform.", LINEAR),
    Under("cls.predictions.layer_norm.", "bert.head.norm.", NAMED),
    Rename("cls.predictions.decoder_bias", "bert.head.bias"),
    Ignore("cls.predictions.decoder_weight"),
    Ignore("cls.predictions.decoder.weight"),
    Ignore("cls.predictions.decoder.bias"),
    Ignore("cls.seq_relationship.{*}"),
])
.with_prefixes(&[PREFIX]);

impl Layout {
    /// The key map of a model of this shape.
    pub const fn keys(self, config: &ErnieConfig) -> &'static KeyMap {
        match (self, config.bert.head) {
            (Self::Transformers, false) => &KEYS,
            (Self::Transformers, true) => &KEYS_WITH_HEAD,
            (Self::Paddle, false) => &PADDLE_KEYS,
            (Self::Paddle, true) => &PADDLE_KEYS_WITH_HEAD,
        }
    }
}

/// ERNIE as the registry knows it.
pub const SYSTEM: System = System {
    name: "ernie",
    about: "bidirectional text encoders that are told the task: ERNIE 2.0, the released sizes of ERNIE 3.0",
    file: "models/ernie.rs",
    tasks: &["embed", "fill", "forward"],
    proved: &["ernie", "ernie3_small", "ernie_mlm"],
    presets: PRESETS,
    recognises: |_, config| {
        config.and_then(|config| config.text("model_type")).is_some_and(|family| FAMILIES.contains(&family))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, layout) = ErnieConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), layout.keys(&config))
    },
    open: |folder, options, device| {
        let (config, layout) = ErnieConfig::of(folder)?;
        let model = fill(folder, config.init(device), layout.keys(&config), options)?;
        Ok(Box::new(Runner { model, config, layout }))
    },
    generator: None,
};

/// An encoder behind the forward contract.
struct Runner {
    model: Ernie,
    config: ErnieConfig,
    layout: Layout,
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `attention_mask`, `token_type_ids`, `position_ids` and `task_type_ids`.
    ///
    /// Tasks that the model does not tell apart say nothing. In transformers' layout gives `last_hidden_state`, with a pooler `pooler_output`, with a masked-LM head
    /// `logits`. In Paddle's gives `sequence_output`, `pooled_output` and `prediction_scores`, all for the
    /// configuration's task, and for `task_type_ids` besides `sequence_output_with_task_ids`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let bert = self.config.bert.read(&mut inputs);
        let tasks = inputs
            .ids::<2>("task_type_ids", self.config.tasks.map_or(i64::MAX as usize, |tasks| tasks.count));
        if let Some(bert) = &bert {
            inputs.like_ids("task_type_ids", tasks.as_ref().map(Tensor::dims), bert.ids.dims());
        }
        inputs.finish()?;
        let Some(bert) = bert else { return Ok(Outputs::new()) }; // was an error

        let (input, with_tasks) = match self.layout {
            Layout::Transformers => (ErnieInput { bert, tasks }, None),
            Layout::Paddle => {
                let with_tasks = tasks.map(|tasks| ErnieInput { bert: bert.clone(), tasks: Some(tasks) });
                (ErnieInput { bert, tasks: None }, with_tasks)
            }
        };
        let [states, pooled_name, scores] = match self.layout {
            Layout::Transformers => ["last_hidden_state", "pooler_output", "logits"],
            Layout::Paddle => ["sequence_output", "pooled_output", "prediction_scores"],
        };
        let BertOutput { hidden, pooled } = self.model.forward(input);
        let mut outputs = vec![output(states, hidden.clone())];
        outputs.extend(pooled.map(|pooled| output(pooled_name, pooled)));
        outputs.extend(self.model.bert.logits(hidden).map(|logits| output(scores, logits)));
        if let Some(input) = with_tasks {
            outputs.push(output("sequence_output_with_task_ids", self.model.forward(input).hidden));
        }
        Ok(outputs)
    }
}

/// PaddleNLP's `ernie-3.0-base-zh`.
const BASE: ErnieConfig = ErnieConfig {
    bert: BertConfig {
        vocab_size: 40000,
        n_positions: 2048,
        n_token_types: 4,
        layer_norm_eps: 1e-5,
        ..bert::BASE
    },
    tasks: Some(Tasks { count: 3, default: 0 }),
    padding: None,
};

/// The other sizes, all with sixteen tasks.
const fn sized(n_layers: usize, d_model: usize, n_heads: usize) -> ErnieConfig {
    let bert = BertConfig { n_layers, d_model, n_heads, d_ff: 4 * d_model, ..BASE.bert };
    ErnieConfig { bert, tasks: Some(Tasks { count: 16, default: 0 }), ..BASE }
}

const fn preset(name: &'static str, config: ErnieConfig, parameters: usize) -> Preset {
    Preset {
        name,
        shape: Shape::Ernie(config),
        weights: Weights::Hub,
        license: "Apache-2.0",
        parameters,
        source: "transformers, ErnieModel with its pooler; PaddleNLP rounds it to millions",
    }
}

/// Published sizes: 296, 118, 75, 27, 23 and 18 million.
pub const PRESETS: &[Preset] = &[
    preset("nghuyong/ernie-3.0-xbase-zh", sized(20, 1024, 16), 296_053_760),
    preset("nghuyong/ernie-3.0-base-zh", BASE, 117_944_832),
    preset("nghuyong/ernie-3.0-medium-zh", sized(6, 768, 12), 75_427_584),
    preset("nghuyong/ernie-3.0-mini-zh", sized(6, 384, 12), 26_949_504),
    preset("nghuyong/ernie-3.0-micro-zh", sized(4, 384, 12), 23_400_576),
    preset("nghuyong/ernie-3.0-nano-zh", sized(4, 312, 12), 17_912_232),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Tolerance;
    use volary_weights::parameters;

    use super::*;

    const TINY: ErnieConfig = ErnieConfig {
        bert: BertConfig {
            vocab_size: 20,
            n_positions: 8,
            d_model: 8,
            d_ff: 16,
            n_layers: 1,
            n_heads: 2,
            ..BASE.bert
        },
        tasks: Some(Tasks { count: 3, default: 2 }),
        padding: Some(0),
    };

    fn hidden(model: &Ernie, ids: [[i64; 3]; 1], tasks: Option<[[i64; 3]; 1]>) -> Tensor<3> {
        let device = Device::flex();
        let tasks = tasks.map(|tasks| Tensor::from_data(tasks, &device));
        model.forward(ErnieInput { tasks, ..Tensor::<2, Int>::from_data(ids, &device).into() }).hidden
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_one_parameter() {
        for layout in [Layout::Transformers, Layout::Paddle] {
            for head in [false, true] {
                let config = ErnieConfig { bert: BertConfig { head, ..TINY.bert }, ..TINY };
                let keys = layout.keys(&config);
                for parameter in parameters(&config.init(&Device::flex())) {
                    let found = keys.keys(&parameter.path).unwrap();
                    assert!(!found.is_empty(), "{layout:?} {}", parameter.path);
                    assert_eq!(keys.paths(&found[0]).unwrap(), [parameter.path]);
                }
            }
        }
    }

    #[test]
    fn without_tasks_the_configured_one_is_meant() {
        let model = TINY.init(&Device::flex());
        let expected = hidden(&model, [[3, 4, 5]], Some([[2, 2, 2]])).into_data();
        hidden(&model, [[3, 4, 5]], None).into_data().assert_eq(&expected, true);
        let other = hidden(&model, [[3, 4, 5]], Some([[2, 1, 2]]));
        assert!(
            (other - Tensor::from_data(expected, &Device::flex())).abs().max().into_scalar::<f32>() > 1e-3
        );
    }

    /// Paddle's padding has the zero vector, so that what its row holds does not matter.
    #[test]
    fn the_row_of_padding_is_not_read() {
        let mut model = TINY.init(&Device::flex());
        let before = hidden(&model, [[3, 0, 5]], None).into_data();
        model.bert.tokens.weight = model.bert.tokens.weight.map(|table| {
            let first = table.clone().narrow(0, 0, 1) + 1.0;
            table.slice_assign([0..1, 0..8], first)
        });
        hidden(&model, [[3, 0, 5]], None).into_data().assert_approx_eq::<f32>(&before, Tolerance::default());
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""model_type": "ernie_m""#, "`model_type`: expected ernie, ernie3"),
            (
                r#""model_type": "ernie", "use_task_id": true, "task_id": 3"#,
                "`task_id`: expected a task, 0 to 2",
            ),
            (r#""model_type": "ernie", "num_attention_heads": 5"#, "`num_attention_heads`"),
        ] {
            let config = Config::parse(Path::new("config.json"), format!("{{{fields}}}").as_bytes()).unwrap();
            let message = ErnieConfig::parse(&config, Layout::Paddle).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    /// PaddleNLP's pickle holds what the safetensors do.
    #[test]
    fn a_pickle_of_paddle_gives_the_same_numbers() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ernie3_small");
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model_state.pdparams"] {
            std::fs::copy(fixture.join(name), folder.path().join(name)).unwrap();
        }
        let inputs = volary_weights::read_tensors(&fixture.join("inputs.safetensors")).unwrap();
        let run = |folder: &Path| {
            let options = volary_weights::LoadOptions::default();
            crate::registry::forward(&Folder::Disk(folder.into()), &inputs, &options, &Device::flex())
                .unwrap()
        };
        assert_eq!(run(folder.path()), run(&fixture));
    }
}
