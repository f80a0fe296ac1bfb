"""The settings of every run, with their defaults.

`model` and `objective` show those of `conv` and `elbo`; the settings of another
one are the fields of its class, in vae/models or vae/objectives. A config that
names any other key is refused.
"""

import ml_collections

_SETTINGS = {
  # Initial parameters, order of the examples and every random draw.
  'seed': 0,
  # Workdir of a run; its best checkpoint gives the first parameters where name
  # and shape match. Empty: all are drawn.
  'init_from': '',
  'data': {
    # celeba | cartoon_faces | folder | tfds | a module of your own that has
    # find(data) (data/__init__.py).
    'source': 'cartoon_faces',
    # celeba: the folder of the official archive or of Kaggle's, or TFDS's data
    # directory (gs:// too). folder: any folder of images; train, val and test
    # in it are its splits. cartoon_faces, tfds: TFDS's data directory. Empty:
    # TFDS's default directory.
    'dir': '',
    # tfds: the data set, such as mnist or imagenet_resized/64x64.
    'name': '',
    # tfds: a split expression for each split, such as train[:90%]. Empty: the
    # data set's own split of this name.
    'train': '',
    'validation': '',
    'test': '',
    # Side of the central square that is cut out of the original image. 0: 148
    # of celeba and cartoon_faces, else the largest square.
    'crop_size': 0,
    'image_size': 64,  # Side that it is resized to.
    'channels': 3,  # 3 (colour) or 1 (grey).
    # Binarisation: none | dynamic (a Bernoulli draw of each pixel in each
    # training step) | fixed (drawn once) | threshold (white from 128).
    'binarize': 'none',
    # Label that a model with num_classes sees. Empty: the only label there is.
    'label': '',
    # Where decoded images are kept: none (decoded each epoch) | host (in
    # memory) | device (in each accelerator's memory) | auto (none if
    # they take half of the host's free memory or more; else device if they take
    # less than half of its memory, else host).
    'cache': 'auto',
    # Where they are kept between runs, unless cache is none: a folder that may
    # be deleted at any time. Empty: nowhere.
    'decoded_dir': '~/.cache/vae/decoded',
    # Whether images that cannot be decoded are left out, and counted, or stop
    # the run.
    'skip_corrupt': False,
  },
  'model': {
    # conv | mlp | residual | fsq | vq, of vae/models/, or a module of your own;
    # the other settings are its fields, here those of conv.
    'name': 'conv',
    'latent_dim': 128,
    # Output channels of the encoder's stride-2 convolutions.
    'hidden_channels': (32, 64, 128, 256, 512),
    # Output channels of the decoder's transposed convolutions. Empty: the
    # mirror image, (256, 128, 64, 32, 32).
    'decoder_channels': (),
    'activation': 'leaky_relu',  # leaky_relu | relu.
    # gaussian | gaussian_per_pixel | laplace | bernoulli | continuous_bernoulli
    # | logistic | logistic_mixture, of vae/likelihoods.py.
    'likelihood': 'gaussian',
    # Standard deviation for gaussian and laplace; its first value if learned.
    'sigma': 1.0,
    'learn_sigma': False,
    'posterior': 'diagonal',  # diagonal | full | flow: of q(z|x).
    # normal | vamp | mixture | flow | two_stage: p(z).
    'latent_prior': 'normal',
    'prior_components': 500,  # Components of vamp and mixture.
    # Classes of the label that encoder and decoder see. 0: no label.
    'num_classes': 0,
    'dtype': 'float32',  # float32 | bfloat16 | float64 (JAX_ENABLE_X64=1).
    # Whether the decoder's kernels are divided by their largest singular value.
    'spectral_norm': False,
    'upsampling': 'transposed',  # transposed | nearest.
    # auto (by the platform) | native | matmul | dilated (as in exports).
    'convolution': 'auto',
    # random | pca (of training images: the best linear VAE; vae/pca.py).
    'initialisation': 'random',
  },
  'objective': {
    # elbo | free_bits | capacity | cyclical | total_correlation | factor | dip
    # | mmd | iwae | rae | vq | prior_only, of vae/objectives/, or a module of
    # your own, likewise.
    'name': 'elbo',
    # Weight of the KL, with the likelihood in nats per image.
    'beta': 1.0,
    'num_samples': 1,  # Samples of z per image.
    # False: z is the posterior's mean. With beta = 0, a plain autoencoder.
    'sample_posterior': True,
    # Standard deviation of Gaussian noise on the encoder's input.
    'input_noise': 0.0,
    # Epochs over which the weight of the KL rises linearly from 0 to beta.
    'kl_warmup_epochs': 0.0,
  },
  'optimizer': {
    'learning_rate': 0.001,  # Adam's.
    'epsilon': 1e-8,  # Adam's.
    # The learning rate is multiplied by this after each epoch.
    'decay_per_epoch': 1.0,
    # Epochs at whose start decay_per_epoch applies, from 1. Empty: each.
    'decay_epochs': (),
    # Weight of the L2 penalty ½‖θ‖² beside a loss in nats per image.
    # PyTorch-VAE has a mean over D pixel values as its loss, so that its
    # `weight_decay` is D/2 times as much here.
    'weight_decay': 0.0,
    # Maximum of the gradient's norm over all parameters. 0: no clipping.
    'clip_norm': 0.0,
    # Decay of an exponential moving average (EMA) of the parameters, such as
    # 0.999; validation and vae.load use the EMA. 0: no EMA.
    'average_decay': 0.0,
  },
  'train': {
    # Global, over all devices. An epoch's last partial batch is dropped.
    'batch_size': 64,
    'num_epochs': 10,
    'flip': True,  # Whether images are mirrored at random.
    # If a loss or gradient is not finite: stop (the last checkpoint stays) |
    # skip (that step is left out, and counted).
    'on_nonfinite': 'stop',
    # Steps that the devices are sent at a time. 0: 10 on a CPU, else up to 100.
    'steps_per_dispatch': 0,
    # Metrics are written at every multiple of this within an epoch, and at its
    # end.
    'log_every_steps': 50,
  },
  'eval': {
    # Validation, pictures and a checkpoint; always after the last epoch.
    'every_epochs': 1,
    'batch_size': 256,
  },
  'checkpoint': {
    # How many of the best by val/loss are kept, besides the last two.
    'keep_best': 2,
    # Between the checkpoints at validations, one every so many minutes.
    'every_minutes': 10.0,
  },
}


def get_config() -> ml_collections.ConfigDict:
  """The full table of settings."""
  return ml_collections.ConfigDict(_SETTINGS)
