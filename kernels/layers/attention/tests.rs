use super::*;
use crate::testing::{assert_close, assert_gradient, floats, noise};
use burn::module::Module;

fn layer() -> Attention {
    AttentionConfig::new(12, 4).with_n_kv_heads(Some(2)).init(&Device::flex())
}

#[test]
fn the_past_ignores_the_future() {
    let (layer, x) = (layer(), noise([2, 7, 12], 1, &Device::flex()));
    let prefix = layer.forward(x.clone().narrow(1, 0, 3), &Mask::Causal);
    assert_close(layer.forward(x, &Mask::Causal).narrow(1, 0, 3), &floats(prefix), 1e-6);
}

#[test]
fn full_attention_does_not_know_the_order() {
    let (layer, x) = (layer(), noise([2, 5, 12], 1, &Device::flex()));
    let turned = layer.forward(x.clone().flip([1]), &Mask::Full).flip([1]);
    assert_close(layer.forward(x, &Mask::Full), &floats(turned), 1e-6);
}

/// A scale that is given takes the place of the usual one, with a cache and without.
#[test]
fn the_scale_is_a_factor_on_the_queries() {
    let config = AttentionConfig::new(12, 4).with_bias(false).with_scale(Some(1.0));
    let (layer, x) = (config.init(&Device::flex()), noise([2, 5, 12], 1, &Device::flex()));
    let mut usual = Attention { scale: None, ..layer.clone() };
    usual.query.weight = usual.query.weight.map(|weight| weight * 3f64.sqrt()); // heads of 3 channels
    let expected = floats(usual.forward(x.clone(), &Mask::Causal));
    assert_close(layer.forward(x.clone(), &Mask::Causal), &expected, 1e-5);
    assert_close(layer.cached(x, &mut KvCache::new(5), &Mask::Causal), &expected, 1e-5);
}

/// One token attends to itself alone: what remains are the value and output projections.
#[test]
fn one_token_keeps_its_value() {
    let layer = AttentionConfig::new(6, 2).init(&Device::flex());
    let x = noise([3, 1, 6], 1, &Device::flex());
    let expected = layer.output.forward(layer.value.forward(x.clone()));
    assert_close(layer.forward(x, &Mask::Causal), &floats(expected), 1e-6);
}

#[test]
fn cross_attention_to_itself_is_self_attention_and_widths_are_free() {
    let (layer, x) = (layer(), noise([2, 5, 12], 1, &Device::flex()));
    let own = layer.forward(x.clone(), &Mask::Full);
    assert_close(layer.cross(x.clone(), x.clone(), &Mask::Full), &floats(own), 0.0);

    let config = AttentionConfig::new(12, 3).with_d_head(Some(5)).with_d_context(Some(7));
    let layer = config.with_bias(false).with_output_bias(false).init(&Device::flex());
    assert_eq!(layer.cross(x, noise([2, 9, 7], 2, &Device::flex()), &Mask::Full).dims(), [2, 5, 12]);
    assert_eq!(layer.num_params(), 15 * 12 + 2 * (15 * 7) + 12 * 15);
}

#[test]
fn gradients_match_finite_differences() {
    let layer = AttentionConfig::new(4, 2).with_n_kv_heads(Some(1)).init(&Device::flex()).train();
    let x = floats(noise([1, 3, 4], 1, &Device::flex()));
    assert_gradient(|x| layer.forward(x, &Mask::Causal), [1, 3, 4], &x);
}

/// In steps of 1, and of 3 and 4.
#[test]
fn a_cache_gives_what_all_at_once_gives() {
    let (layer, x) = (layer(), noise([2, 7, 12], 1, &Device::flex()));
    let expected = floats(layer.forward(x.clone(), &Mask::Causal));
    for steps in [&[1; 7][..], &[3, 4]] {
        let mut cache = KvCache::new(9);
        let mut outputs = Vec::new();
        for &step in steps {
            let new = x.clone().narrow(1, cache.len(), step);
            outputs.push(layer.cached(new, &mut cache, &Mask::Causal));
        }
        assert_eq!(cache.len(), 7);
        assert_close(Tensor::cat(outputs, 1), &expected, 1e-6);
    }
}

#[test]
fn a_truncated_cache_forgets() {
    let (layer, x) = (layer(), noise([1, 5, 12], 1, &Device::flex()));
    let mut cache = KvCache::new(5);
    layer.cached(x.clone(), &mut cache, &Mask::Causal);
    cache.truncate(8);
    assert_eq!(cache.len(), 5);
    cache.truncate(2);
    assert_eq!(cache.len(), 2);
    let other = noise([1, 3, 12], 2, &Device::flex());
    let expected =
        layer.forward(Tensor::cat(vec![x.narrow(1, 0, 2), other.clone()], 1), &Mask::Causal).narrow(1, 2, 3);
    assert_close(layer.cached(other, &mut cache, &Mask::Causal), &floats(expected), 1e-6);
    cache.truncate(0);
    assert!(cache.is_empty());
}

/// Beams: a clone goes on alone.
#[test]
fn a_cloned_cache_is_independent() {
    let (layer, x) = (layer(), noise([1, 4, 12], 1, &Device::flex()));
    let mut cache = KvCache::new(4);
    layer.cached(x.clone().narrow(1, 0, 3), &mut cache, &Mask::Causal);
    let mut beam = cache.clone();
    layer.cached(noise([1, 1, 12], 2, &Device::flex()), &mut beam, &Mask::Causal);
    let last = layer.cached(x.clone().narrow(1, 3, 1), &mut cache, &Mask::Causal);
    assert_close(last, &floats(layer.forward(x, &Mask::Causal).narrow(1, 3, 1)), 1e-6);
}

#[test]
#[should_panic(expected = "cache of 4 tokens cannot hold 5")]
fn a_full_cache_panics() {
    let (layer, x) = (layer(), noise([1, 5, 12], 1, &Device::flex()));
    let mut cache = KvCache::new(4);
    layer.cached(x.clone().narrow(1, 0, 3), &mut cache, &Mask::Causal);
    layer.cached(x.narrow(1, 3, 2), &mut cache, &Mask::Causal);
}

/// Rows that are taken twice, swapped or dropped go on as if they had always been so.
#[test]
fn a_cache_of_selected_rows_goes_on_from_them() {
    let (layer, x) = (layer(), noise([3, 5, 12], 1, &Device::flex()));
    let rows = Tensor::from_ints([2, 0, 2], &Device::flex());
    let expected = layer.forward(x.clone().select(0, rows.clone()), &Mask::Causal).narrow(1, 4, 1);
    let mut cache = KvCache::new(5);
    layer.cached(x.clone().narrow(1, 0, 4), &mut cache, &Mask::Causal);
    cache.select(&rows);
    let last = layer.cached(x.narrow(1, 4, 1).select(0, rows), &mut cache, &Mask::Causal);
    assert_close(last, &floats(expected), 1e-6);
}

/// In steps of any sizes, shorter and longer than the window.
#[test]
fn a_sliding_cache_gives_what_a_banded_mask_gives() {
    let (layer, x) = (layer(), noise([2, 23, 12], 1, &Device::flex()));
    for window in [1, 2, 3, 5, 30] {
        let expected = floats(layer.forward(x.clone(), &Mask::Window(window)));
        for steps in [&[1; 23][..], &[4, 1, 1, 1, 9, 1, 2, 1, 3], &[12, 1, 1, 1, 1, 1, 6], &[23]] {
            let mut cache = KvCache::sliding(window);
            let mut outputs = Vec::new();
            for &step in steps {
                let new = x.clone().narrow(1, cache.len(), step);
                outputs.push(layer.cached(new, &mut cache, &Mask::Window(window)));
                assert_eq!(cache.key.as_ref().map_or(2 * window, |key| key.dims()[2]), 2 * window);
            }
            assert_eq!(cache.len(), 23);
            assert_close(Tensor::cat(outputs, 1), &expected, 1e-6);
        }
    }
}

/// One token at a time gets exactly the window, without a mask.
#[test]
fn a_sliding_cache_keeps_the_window() {
    let mut cache = KvCache::sliding(3);
    for token in 0i32..20 {
        let key = Tensor::<4>::full([1, 1, 1, 1], token, &Device::flex());
        let (key, value) = cache.append(key.clone(), -key);
        let seen: Vec<f64> = ((token - 2).max(0)..=token).map(f64::from).collect();
        assert_eq!(floats(key), seen);
        assert_eq!(floats(-value), seen);
    }
    cache.truncate(19); // 17 and 18 are held
    let key = Tensor::<4>::full([1, 1, 1, 1], 50.0, &Device::flex());
    assert_eq!(floats(cache.append(key.clone(), key).0), [17.0, 18.0, 50.0]);
}

#[test]
#[should_panic(expected = "tokens 3 to 15 are gone")]
fn what_slid_away_does_not_come_back() {
    let mut cache = KvCache::sliding(3);
    let key = Tensor::<4>::zeros([1, 1, 17, 1], &Device::flex());
    cache.append(key.clone(), key);
    cache.truncate(5);
}
