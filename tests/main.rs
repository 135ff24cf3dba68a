//! One binary for all tests that see the whole program.

mod cli;
mod contract;
mod corrupt;
mod parity;
mod readme;
mod support;
#[cfg(feature = "train")]
mod training;
