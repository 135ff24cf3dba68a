//! A row that the units of a cube work on together.

use cubecl::client::Client;
use cubecl::ir::features::Plane;
use cubecl::prelude::*;

/// The units of a cube that share a row. They sum up by halves in shared memory; where planes are all of one size and have
/// operations of their own, each sums up its units' values first.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Team {
    units: usize,
    /// Units of a plane, or 1 where planes do not sum up.
    lanes: usize,
}

impl Team {
    /// For rows of so many vectors: `most` units, or as few as there is work for.
    pub fn new(vectors: usize, most: usize, client: &Client) -> Self {
        let properties = client.properties();
        let hardware = &properties.hardware;
        let most = 1 << most.min(hardware.max_units_per_cube as usize).max(1).ilog2();
        let lanes = hardware.plane_size_max as usize;
        let has_planes =
            properties.features.plane.contains(Plane::Ops) && hardware.plane_size_min as usize == lanes;
        let lanes = if has_planes && lanes.is_power_of_two() && lanes <= most { lanes } else { 1 };
        Self { units: vectors.next_power_of_two().clamp(lanes, most), lanes }
    }

    /// Values in shared memory while they sum up.
    pub fn parts(&self) -> usize {
        self.units / self.lanes
    }

    /// The cube.
    pub fn cube(&self) -> CubeDim {
        CubeDim::new_1d(self.units as u32)
    }
}

/// What becomes of the values of all units.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Fold {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

#[cube]
fn both(a: f32, b: f32, #[comptime] fold: Fold) -> f32 {
    if comptime!(fold == Fold::Max) { max(a, b) } else { a + b }
}

/// What all units' values fold into, in every unit. All units of the cube come here.
///
/// - `shared`: as many values as [`Team::parts`]
#[cube]
#[allow(clippy::manual_is_multiple_of, reason = "of Rust's own: it is not for kernels")]
pub fn fold(value: f32, shared: &mut Shared<[f32]>, #[comptime] team: Team, #[comptime] fold: Fold) -> f32 {
    let unit = UNIT_POS as usize;
    let lanes = comptime!(team.lanes);
    let mut value = value;
    if comptime!(lanes > 1) {
        if comptime!(fold == Fold::Max) {
            value = plane_max(value);
        } else {
            value = plane_sum(value);
        }
    }
    if unit % lanes == 0 {
        shared[unit / lanes] = value;
    }
    sync_cube();
    #[unroll]
    for step in 0..comptime!(team.parts().ilog2() as usize) {
        let half = comptime!(team.parts() >> (step + 1));
        if unit < half {
            shared[unit] = both(shared[unit], shared[unit + half], fold);
        }
        sync_cube();
    }
    let all = shared[0];
    sync_cube();
    all
}
