//! The key map as data: which checkpoint key fills which module parameter, read in both directions.
//!
//! In a pattern, `{}` stands for one decimal index (`0`, `7`, `31`; no leading zeros); the indices on the one side
//! are put into the other in order. `{*}` ends an [`Rule::Ignore`] pattern and stands for any rest.

use crate::error::Error;
use crate::share::Share;

/// One line of a key map. On the left the checkpoint's keys, on the right the module's parameter paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// `(key, path)`: the same tensor under another name.
    Rename(&'static str, &'static str),
    /// `(key, paths)`: the checkpoint stacks several parameters along its first dimension (a fused q, k, v). They are
    /// cut by the sizes of the module's parameters, which may differ.
    Split(&'static str, &'static [&'static str]),
    /// `(key, paths)`: as [`Rule::Split`], of several layers stored the other way round, `[d_in, d_out of all]`: each
    /// parameter is a run of columns, transposed.
    SplitTranspose(&'static str, &'static [&'static str]),
    /// `(keys, path)`: the parameter is the checkpoint's tensors stacked along the first dimension. Any sizes load;
    /// saving cuts equal parts.
    Concat(&'static [&'static str], &'static str),
    /// `(key, path, ones)`: one tensor for each place along the first dimension of the parameter, as of experts in a
    /// mixture: the last `{}` of the key, which the path lacks, counts them from 0. They may have dimensions of size 1 as
    /// with [`Rule::Reshape`].
    Stack(&'static str, &'static str, Ones),
    /// `(key, path, ones)`: as [`Rule::Stack`], the last two dimensions of each tensor swapped.
    StackTranspose(&'static str, &'static str, Ones),
    /// `(key, path)`: the last two dimensions are swapped.
    Transpose(&'static str, &'static str),
    /// `(key, path, ones)`: the checkpoint's shape has dimensions of size 1 that the module's lacks, as `[1, n, d]` for
    /// `[n, d]`. Any number of them loads; saving writes those of `ones`.
    Reshape(&'static str, &'static str, Ones),
    /// `(key)`: a tensor that the module has no use for: a constant buffer, an unused head, the second copy of a tied
    /// weight.
    Ignore(&'static str),
    /// `(key prefix, path prefix, rules)`: the rules of a part, e.g. of an image tower inside a two-tower model.
    Under(&'static str, &'static str, &'static [Rule]),
}

/// Where a checkpoint's tensor has dimensions of size 1 that the module's lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ones {
    /// So many before the module's: a position table `[1, n, d]` for `[n, d]`.
    Before(usize),
    /// So many after the module's: a 1x1 convolution `[out, in, 1, 1]` for `[out, in]`.
    After(usize),
    /// The other way round: a scalar `[]` for `[1]`.
    Scalar,
}

impl Ones {
    /// The checkpoint's shape for the module's `shape`.
    pub(crate) fn stored(self, shape: &[usize]) -> Vec<usize> {
        match self {
            Ones::Before(count) => [&vec![1; count], shape].concat(),
            Ones::After(count) => [shape, &vec![1; count]].concat(),
            Ones::Scalar => Vec::new(),
        }
    }
}

/// Why a rule cannot be followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A pattern without text.
    #[error("an empty pattern")]
    Empty,
    /// A split into, or a concatenation of, nothing.
    #[error("an empty list of patterns")]
    NoPatterns,
    /// The indices cannot be carried over.
    #[error("the patterns do not have the same number of `{{}}`")]
    Indices,
    /// `{}` next to a digit or another `{}`: where one number ends cannot be seen.
    #[error("`{{}}` touches a digit or another `{{}}`")]
    Touching,
    /// `{*}` where it cannot be undone.
    #[error("`{{*}}` may only end an Ignore pattern")]
    Rest,
}

/// The key map of a system: its rules, and the prefixes that some uploads put before every key.
///
/// A checkpoint may carry one of `prefixes` before the keys that the rules name (`bert.` before
/// `encoder.layer.0...`). The first one under which most keys match is used; it is stripped where it stands, so that
/// keys without it (`cls.predictions.bias` beside `bert.encoder...`) still match as they are. [`save()`](crate::save())
/// writes no prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyMap {
    /// Each key of a checkpoint must match exactly one of them.
    pub rules: &'static [Rule],
    /// What may stand before the keys, e.g. `&["bert."]`; no prefix at all is always tried first.
    pub prefixes: &'static [&'static str],
}

impl KeyMap {
    /// A key map without optional prefixes.
    pub const fn new(rules: &'static [Rule]) -> Self {
        Self { rules, prefixes: &[] }
    }

    /// The same map, for checkpoints that may carry one of `prefixes` before their keys.
    pub const fn with_prefixes(self, prefixes: &'static [&'static str]) -> Self {
        Self { prefixes, ..self }
    }

    /// The module paths that the checkpoint key (without an optional prefix) fills: none when it is ignored or
    /// unknown; several when it is split.
    ///
    /// # Errors
    /// [`Error::Rule`] when a rule cannot be followed.
    pub fn paths(&self, key: &str) -> Result<Vec<String>, Error> {
        Ok(self.lines()?.iter().find_map(|line| line.paths_of(key)).unwrap_or_default())
    }

    /// The checkpoint keys (without an optional prefix) that the module path is made of, by the first rule that
    /// names it; none when no rule does. Of a stack it is the first one: how many there are, the parameter's shape tells.
    ///
    /// # Errors
    /// [`Error::Rule`] when a rule cannot be followed.
    pub fn keys(&self, path: &str) -> Result<Vec<String>, Error> {
        Ok(self.lines()?.iter().find_map(|line| line.keys_of(path, &[], Share::WHOLE)).unwrap_or_default())
    }

    /// The checkpoint keys of `count` places that the first rule which stacks `path` makes it of; none when no rule does.
    ///
    /// # Errors
    /// [`Error::Rule`] when a rule cannot be followed.
    pub fn stacked_keys(&self, path: &str, count: usize) -> Result<Vec<String>, Error> {
        let lines = self.lines()?;
        let stack = lines.iter().find(|line| line.is_stack() && line.leads_to(path));
        Ok(stack.and_then(|line| line.keys_of(path, &[count], Share::WHOLE)).unwrap_or_default())
    }

    /// What `other`, a map of the same module, calls each of a checkpoint's `keys`; none where this map ignores or does not
    /// know it, or the other has no key for it. Of several it is the first.
    ///
    /// # Errors
    /// [`Error::Rule`] when a rule of either cannot be followed.
    pub fn translated(&self, keys: &[&str], other: &KeyMap) -> Result<Vec<Option<String>>, Error> {
        let (lines, others) = (self.lines()?, other.lines()?);
        let prefix = choose_prefix(&lines, self.prefixes, keys);
        let translated = |key: &&str| {
            let paths = lines.iter().find_map(|line| line.paths_of(strip(key, prefix)))?;
            let path = paths.first()?;
            others.iter().find_map(|line| line.keys_of(path, &[], Share::WHOLE))?.into_iter().next()
        };
        Ok(keys.iter().map(translated).collect())
    }

    /// The rules, checked, with those of parts spelled out.
    pub(crate) fn lines(&self) -> Result<Vec<Line>, Error> {
        let mut lines = Vec::new();
        flatten(self.rules, "", "", &mut lines)?;
        Ok(lines)
    }
}

/// The prefix among no prefix and `prefixes` under which most of `keys` match a line.
pub(crate) fn choose_prefix(lines: &[Line], prefixes: &[&'static str], keys: &[&str]) -> &'static str {
    let matching = |prefix: &str| {
        let known = |key: &&&str| lines.iter().any(|line| line.matches(strip(key, prefix)));
        keys.iter().filter(known).count()
    };
    let mut best = ("", matching(""));
    for &prefix in prefixes {
        let count = matching(prefix);
        if count > best.1 {
            best = (prefix, count);
        }
    }
    best.0
}

/// `key` without `prefix`, where it has it.
pub(crate) fn strip<'a>(key: &'a str, prefix: &str) -> &'a str {
    key.strip_prefix(prefix).unwrap_or(key)
}

fn flatten(rules: &[Rule], key_prefix: &str, path_prefix: &str, lines: &mut Vec<Line>) -> Result<(), Error> {
    for &rule in rules {
        let line = |keys: &[&str], paths: &[&str]| {
            Line::new(rule, keys, key_prefix, paths, path_prefix)
                .map_err(|reason| Error::Rule { rule, reason })
        };
        lines.push(match rule {
            Rule::Rename(key, path)
            | Rule::Transpose(key, path)
            | Rule::Reshape(key, path, _)
            | Rule::Stack(key, path, _)
            | Rule::StackTranspose(key, path, _) => line(&[key], &[path])?,
            Rule::Split(key, paths) | Rule::SplitTranspose(key, paths) => line(&[key], paths)?,
            Rule::Concat(keys, path) => line(keys, &[path])?,
            Rule::Ignore(key) => line(&[key], &[])?,
            Rule::Under(key, path, rules) => {
                flatten(rules, &format!("{key_prefix}{key}"), &format!("{path_prefix}{path}"), lines)?;
                continue;
            }
        });
    }
    Ok(())
}

/// A rule with its patterns taken apart.
#[derive(Debug)]
pub(crate) struct Line {
    pub rule: Rule,
    keys: Vec<Pattern>,
    paths: Vec<Pattern>,
}

impl Line {
    fn new(
        rule: Rule,
        keys: &[&str],
        key_prefix: &str,
        paths: &[&str],
        path_prefix: &str,
    ) -> Result<Self, RuleError> {
        let ignore = matches!(rule, Rule::Ignore(_));
        if keys.is_empty() || (paths.is_empty() && !ignore) {
            return Err(RuleError::NoPatterns);
        }
        let read = |prefix: &str, patterns: &[&str]| -> Result<Vec<Pattern>, RuleError> {
            patterns.iter().map(|pattern| Pattern::new(&format!("{prefix}{pattern}"))).collect()
        };
        let line = Self { rule, keys: read(key_prefix, keys)?, paths: read(path_prefix, paths)? };
        let mut patterns = line.keys.iter().chain(&line.paths);
        if !ignore && patterns.any(|pattern| pattern.0.contains(&Token::Rest)) {
            return Err(RuleError::Rest);
        }
        let counted = usize::from(line.is_stack());
        let indices = line.keys[0].indices();
        if !line.paths.iter().all(|pattern| pattern.indices() + counted == indices)
            || !line.keys.iter().all(|pattern| pattern.indices() == indices)
        {
            return Err(RuleError::Indices);
        }
        Ok(line)
    }

    pub fn is_ignored(&self) -> bool {
        self.paths.is_empty()
    }

    /// Whether the last index of its key counts tensors of one parameter.
    pub fn is_stack(&self) -> bool {
        matches!(self.rule, Rule::Stack(..) | Rule::StackTranspose(..))
    }

    /// Whether this line is about the module path.
    pub fn leads_to(&self, path: &str) -> bool {
        self.paths.iter().any(|pattern| pattern.indices_of(path).is_some())
    }

    /// The path and the place in it that `key` of a stack fills.
    pub fn place_of(&self, key: &str) -> Option<(String, usize)> {
        if !self.is_stack() {
            return None;
        }
        let place = self.keys[0].indices_of(key)?.pop()?.parse().ok()?;
        Some((self.paths_of(key)?.pop()?, place))
    }

    /// The key of a place in `path`, when this line stacks it: what [`Line::place_of`] undoes.
    pub fn key_at(&self, path: &str, place: usize) -> Option<String> {
        let indices = self.paths.iter().filter(|_| self.is_stack()).find_map(|line| line.indices_of(path))?;
        Some(self.keys[0].fill(&[&indices[..], &[&place.to_string()]].concat()))
    }

    pub fn matches(&self, key: &str) -> bool {
        self.keys.iter().any(|pattern| pattern.indices_of(key).is_some())
    }

    /// The module paths made from `key`, when this line is about it.
    pub fn paths_of(&self, key: &str) -> Option<Vec<String>> {
        let indices = self.keys.iter().find_map(|pattern| pattern.indices_of(key))?;
        Some(self.paths.iter().map(|pattern| pattern.fill(&indices)).collect())
    }

    /// The checkpoint keys that `path` is made from, when this line is about it. Of a stack, as many as the first dimension
    /// of the parameter's `shape` says, from the first of the share.
    pub fn keys_of(&self, path: &str, shape: &[usize], share: Share) -> Option<Vec<String>> {
        let indices = self.paths.iter().find_map(|pattern| pattern.indices_of(path))?;
        if self.is_stack() {
            let places = share.places(shape.first().copied().unwrap_or(1));
            return places.map(|place| self.key_at(path, place)).collect();
        }
        Some(self.keys.iter().map(|pattern| pattern.fill(&indices)).collect())
    }
}

/// A pattern taken apart: `a.{}.b` is `a.`, an index, `.b`.
#[derive(Debug)]
pub(crate) struct Pattern(Vec<Token>);

#[derive(Debug, PartialEq)]
enum Token {
    Text(String),
    Index,
    Rest,
}

impl Pattern {
    pub fn new(pattern: &str) -> Result<Self, RuleError> {
        let mut tokens = Vec::new();
        let mut rest = pattern;
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix("{}") {
                let touched = |before: &Token| match before {
                    Token::Text(text) => text.ends_with(|c: char| c.is_ascii_digit()),
                    Token::Index | Token::Rest => true,
                };
                if tokens.last().is_some_and(touched) || after.starts_with(|c: char| c.is_ascii_digit()) {
                    return Err(RuleError::Touching);
                }
                tokens.push(Token::Index);
                rest = after;
            } else if let Some(after) = rest.strip_prefix("{*}") {
                if !after.is_empty() {
                    return Err(RuleError::Rest);
                }
                tokens.push(Token::Rest);
                rest = after;
            } else {
                let end =
                    [rest.find("{}"), rest.find("{*}")].into_iter().flatten().min().unwrap_or(rest.len());
                tokens.push(Token::Text(rest[..end].to_owned()));
                rest = &rest[end..];
            }
        }
        if tokens.is_empty() { Err(RuleError::Empty) } else { Ok(Self(tokens)) }
    }

    fn indices(&self) -> usize {
        self.0.iter().filter(|token| **token == Token::Index).count()
    }

    /// The indices in `text`, when it has the form of this pattern.
    pub fn indices_of<'a>(&self, text: &'a str) -> Option<Vec<&'a str>> {
        let mut indices = Vec::new();
        let mut rest = text;
        for token in &self.0 {
            match token {
                Token::Text(literal) => rest = rest.strip_prefix(literal.as_str())?,
                Token::Index => {
                    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                    let (index, after) = rest.split_at(end);
                    if index.is_empty() || (index.len() > 1 && index.starts_with('0')) {
                        return None;
                    }
                    indices.push(index);
                    rest = after;
                }
                Token::Rest => rest = "",
            }
        }
        rest.is_empty().then_some(indices)
    }

    fn fill(&self, indices: &[&str]) -> String {
        let mut indices = indices.iter();
        let text = |token: &Token| match token {
            Token::Text(text) => text.clone(),
            Token::Index => indices.next().map(|index| index.to_string()).unwrap_or_default(),
            Token::Rest => String::new(),
        };
        self.0.iter().map(text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Rule::*;

    const KEYS: KeyMap = KeyMap::new(&[
        Rename("h.{}.ln_{}.weight", "blocks.{}.norms.{}.gamma"),
        Split("h.{}.qkv.weight", &["blocks.{}.q.weight", "blocks.{}.k.weight", "blocks.{}.v.weight"]),
        Concat(&["h.{}.w1", "h.{}.w3"], "blocks.{}.gate_up"),
        Ignore("h.{}.attn.bias"),
        Ignore("cls.{*}"),
        Under("visual.", "vision.", &[Rename("conv1.weight", "patch.weight"), Ignore("mask_{}.{*}")]),
    ]);

    fn paths(key: &str) -> Vec<String> {
        KEYS.paths(key).unwrap()
    }

    fn keys(path: &str) -> Vec<String> {
        KEYS.keys(path).unwrap()
    }

    #[test]
    fn indices_are_carried_over_in_order() {
        assert_eq!(paths("h.31.ln_2.weight"), ["blocks.31.norms.2.gamma"]);
        assert_eq!(keys("blocks.31.norms.2.gamma"), ["h.31.ln_2.weight"]);
    }

    #[test]
    fn a_split_names_all_its_parameters_from_either_side() {
        assert_eq!(paths("h.7.qkv.weight"), ["blocks.7.q.weight", "blocks.7.k.weight", "blocks.7.v.weight"]);
        assert_eq!(keys("blocks.7.v.weight"), ["h.7.qkv.weight"]);
        assert_eq!(paths("h.0.w3"), ["blocks.0.gate_up"]);
        assert_eq!(keys("blocks.0.gate_up"), ["h.0.w1", "h.0.w3"]);
    }

    #[test]
    fn a_stack_counts_by_the_last_index_of_its_keys() {
        let keys = KeyMap::new(&[Stack("h.{}.experts.{}.w", "blocks.{}.experts", Ones::Before(0))]);
        assert_eq!(keys.paths("h.7.experts.31.w").unwrap(), ["blocks.7.experts"]);
        assert_eq!(keys.keys("blocks.7.experts").unwrap(), ["h.7.experts.0.w"]);
        let lines = keys.lines().unwrap();
        let all = lines[0].keys_of("blocks.7.experts", &[2, 5], Share::WHOLE).unwrap();
        assert_eq!(all, ["h.7.experts.0.w", "h.7.experts.1.w"]);
        let third = lines[0].keys_of("blocks.7.experts", &[2, 5], Share::new(2, 4).unwrap()).unwrap();
        assert_eq!(third, ["h.7.experts.4.w", "h.7.experts.5.w"]);
        assert_eq!(lines[0].place_of("h.7.experts.31.w"), Some(("blocks.7.experts".into(), 31)));
    }

    #[test]
    fn a_key_has_another_name_in_another_map() {
        const OTHER: KeyMap = KeyMap::new(&[
            Rename("norm.{}.{}", "blocks.{}.norms.{}.gamma"),
            Split("qkv.{}", &["blocks.{}.q.weight", "blocks.{}.k.weight", "blocks.{}.v.weight"]),
            Rename("patch", "vision.patch.weight"),
        ]);
        let keys =
            ["h.3.ln_1.weight", "m.h.7.qkv.weight", "m.visual.conv1.weight", "m.h.3.w1", "cls.x", "m.other"];
        let translated = KEYS.with_prefixes(&["m."]).translated(&keys, &OTHER).unwrap();
        let expected = [Some("norm.3.1"), Some("qkv.7"), Some("patch"), None, None, None];
        assert_eq!(translated, expected.map(|key| key.map(str::to_owned)));
    }

    #[test]
    fn the_rules_of_a_part_stand_under_its_prefixes() {
        assert_eq!(paths("visual.conv1.weight"), ["vision.patch.weight"]);
        assert_eq!(keys("vision.patch.weight"), ["visual.conv1.weight"]);
        assert_eq!(keys("patch.weight"), Vec::<String>::new());
    }

    #[test]
    fn an_index_is_a_canonical_decimal_number() {
        let pattern = Pattern::new("h.{}.w").unwrap();
        assert_eq!(pattern.indices_of("h.0.w"), Some(vec!["0"]));
        assert_eq!(pattern.indices_of("h.120.w"), Some(vec!["120"]));
        for text in ["h..w", "h.01.w", "h.x.w", "h.-1.w", "h.1.w.", "h.1", "g.1.w", "h.1.2.w"] {
            assert_eq!(pattern.indices_of(text), None, "{text}");
        }
    }

    #[test]
    fn a_rest_matches_anything_from_there_on() {
        let lines = KEYS.lines().unwrap();
        let ignored = |key: &str| lines.iter().any(|line| line.is_ignored() && line.matches(key));
        assert!(
            ignored("cls.predictions.transform.dense.weight")
                && ignored("cls.")
                && ignored("visual.mask_3.x")
        );
        assert!(!ignored("cl.bias") && !ignored("visual.mask_x.y"));
    }

    #[test]
    fn rules_that_cannot_be_followed_both_ways_are_refused() {
        let refusal = |rule: &'static [Rule]| match KeyMap::new(rule).lines() {
            Err(Error::Rule { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(refusal(&[Rename("a.{}.b", "c.d")]), RuleError::Indices);
        assert_eq!(refusal(&[Stack("a.{}.b", "c.{}.d", Ones::Before(0))]), RuleError::Indices);
        assert_eq!(refusal(&[Rename("a.{*}", "b.{*}")]), RuleError::Rest);
        assert_eq!(refusal(&[Ignore("a.{*}.b")]), RuleError::Rest);
        assert_eq!(refusal(&[Rename("a.{}{}", "b.{}.{}")]), RuleError::Touching);
        assert_eq!(refusal(&[Rename("a1{}", "b.{}")]), RuleError::Touching);
        assert_eq!(refusal(&[Rename("", "b")]), RuleError::Empty);
        assert_eq!(refusal(&[Split("a", &[])]), RuleError::NoPatterns);
        assert_eq!(refusal(&[Concat(&[], "a")]), RuleError::NoPatterns);
    }

    #[test]
    fn the_prefix_under_which_most_keys_match_is_chosen() {
        let map = KeyMap::new(&[Rename("a", "a"), Rename("b", "b"), Ignore("cls.{*}")]);
        let lines = map.lines().unwrap();
        let chosen = |keys: &[&str]| choose_prefix(&lines, &["bert.", "model.bert."], keys);
        assert_eq!(chosen(&["a", "b", "cls.x"]), "");
        assert_eq!(chosen(&["bert.a", "bert.b", "cls.x"]), "bert.");
        assert_eq!(chosen(&["model.bert.a", "model.bert.b"]), "model.bert.");
        assert_eq!(chosen(&["unknown"]), "");
    }

    proptest::proptest! {
        /// Filling a pattern and reading it again gives the indices back.
        #[test]
        fn fill_and_match_are_inverse(i: u32, j: u32) {
            let pattern = Pattern::new("enc.{}.moe.expert_{}.w").unwrap();
            let (i, j) = (i.to_string(), j.to_string());
            let text = pattern.fill(&[&i, &j]);
            proptest::prop_assert_eq!(pattern.indices_of(&text), Some(vec![i.as_str(), j.as_str()]));
        }
    }
}
