//! Bars on standard error, where that is a terminal.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use volary_weights::hub::{Bar, Bars, Environment, Progress, Silent};

/// What shows downloads here.
pub fn of(environment: &Environment) -> Arc<dyn Progress> {
    match environment.bars {
        Bars::Shown if io::stderr().is_terminal() => Arc::new(Shown(MultiProgress::new())),
        _ => Arc::new(Silent),
    }
}

struct Shown(MultiProgress);

struct File(ProgressBar);

impl Progress for Shown {
    fn begin(&self, file: &str) -> Box<dyn Bar> {
        let bar = self.0.add(ProgressBar::no_length());
        if let Ok(style) =
            ProgressStyle::with_template("{msg:40!} {bytes:>11} of {total_bytes:<11} {wide_bar} {eta:>4}")
        {
            bar.set_style(style);
        }
        bar.set_message(file.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Box::new(File(bar))
    }
}

impl Bar for File {
    fn at(&mut self, here: u64, of: Option<u64>) {
        if let Some(of) = of {
            self.0.set_length(of);
        }
        self.0.set_position(here);
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
