//! One binary for all tests that see the whole program.
#![allow(clippy::unwrap_used)] // a test may panic

mod bench;
mod cli;
mod contract;
mod convert;
mod corrupt;
mod experts;
mod growth;
#[cfg(unix)] // links, signals
mod hub;
mod imagine;
mod paint;
mod parity;
mod readme;
mod search;
mod support;
mod towers;
#[cfg(feature = "train")]
mod training;
mod writing;
