//! Pictures: reading them, preparing them, and the parts that models of them are built from.

pub mod image;
pub mod preprocess;
pub mod resample;

pub mod autoencoder;
pub mod conv;
pub mod diffusion;
pub mod efficientnet;
pub mod interpolation;
pub mod masking;
pub mod palette;
pub mod patch;
pub mod position;
pub mod residual;
pub mod resnet;
pub mod sample;
pub mod unet;
pub mod vq;
