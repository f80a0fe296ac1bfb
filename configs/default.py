"""Every setting there is, with its default.

The other configs start from this one and say what they change. A key that is
not here does not exist: a config that names one is refused.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The full table of settings."""
  config = ml_collections.ConfigDict()

  # Initial parameters, order of the examples and every random draw.
  config.seed = 0

  config.data = data = ml_collections.ConfigDict()
  # celeba | cartoon_faces | folder | tfds | a module of your own that has
  # find(data) (data/__init__.py).
  data.source = 'cartoon_faces'
  # celeba: the folder of the official archive or of Kaggle's, or TFDS's data
  # directory (gs:// too). folder: any folder of images; train, val and test in
  # it are its splits. cartoon_faces, tfds: TFDS's data directory. Empty: TFDS's
  # default directory.
  data.dir = ''
  # tfds: the data set, such as mnist or imagenet_resized/64x64.
  data.name = ''
  # tfds: a split expression for each split, such as train[:90%]. Empty: the
  # data set's own split of this name.
  data.train = ''
  data.validation = ''
  data.test = ''
  # Side of the central square that is cut out of the original image. 0: 148 of
  # celeba and cartoon_faces, else the largest square.
  data.crop_size = 0
  # Side that it is resized to.
  data.image_size = 64
  # 3 (colour) or 1 (grey).
  data.channels = 3
  # Where decoded images are kept: none (decoded anew each epoch) | host (in
  # memory) | device (in each accelerator's memory) | auto (the last of these
  # in which they take less than half of what is free).
  data.cache = 'auto'
  # Where they are kept between runs, unless cache is none: a folder that may be
  # deleted at any time. Empty: nowhere.
  data.decoded_dir = '~/.cache/vae/decoded'
  # Whether images that cannot be decoded are left out, and counted, or stop
  # the run.
  data.skip_corrupt = False

  config.model = model = ml_collections.ConfigDict()
  # conv | mlp | residual | fsq, of vae/models/, or a module of your own; it
  # says which other settings there are, and these are conv's.
  model.name = 'conv'
  model.latent_dim = 128
  # Output channels of the encoder's stride-2 convolutions.
  model.hidden_channels = (32, 64, 128, 256, 512)
  # Output channels of the decoder's transposed convolutions. Empty: the mirror
  # image, (256, 128, 64, 32, 32).
  model.decoder_channels = ()
  # leaky_relu | relu.
  model.activation = 'leaky_relu'
  # gaussian | bernoulli.
  model.likelihood = 'gaussian'
  # Standard deviation of the Gaussian likelihood; where it starts if learned.
  model.sigma = 1.0
  model.learn_sigma = False
  # float32 | bfloat16 | float64 (with JAX_ENABLE_X64=1).
  model.dtype = 'float32'
  # auto (by the platform) | native | matmul.
  model.convolution = 'auto'

  config.objective = objective = ml_collections.ConfigDict()
  # elbo | free_bits, of vae/objectives/, or a module of your own, likewise.
  objective.name = 'elbo'
  # Weight of the KL, with the likelihood in nats per image.
  objective.beta = 1.0
  # Samples of z per image.
  objective.num_samples = 1
  # False: z is the posterior's mean. With beta = 0, a plain autoencoder.
  objective.sample_posterior = True
  # Standard deviation of Gaussian noise on the encoder's input.
  objective.input_noise = 0.0
  # Epochs over which the weight of the KL rises linearly from 0 to beta.
  objective.kl_warmup_epochs = 0.0

  config.optimizer = optimizer = ml_collections.ConfigDict()
  # Adam's.
  optimizer.learning_rate = 0.001
  # The learning rate is multiplied by this after each epoch.
  optimizer.decay_per_epoch = 1.0
  # Weight of the L2 penalty ½‖θ‖² beside a loss in nats per image. PyTorch-VAE
  # has a mean over D pixel values as its loss, so that its `weight_decay` is
  # D/2 times as much here.
  optimizer.weight_decay = 0.0
  # Of the gradient's norm over all parameters, at most. 0: it is not clipped.
  optimizer.clip_norm = 0.0

  config.train = train = ml_collections.ConfigDict()
  # Global, over all devices. An epoch's last partial batch is dropped.
  train.batch_size = 64
  train.num_epochs = 10
  # Whether images are mirrored at random.
  train.flip = True
  # Where a loss or gradient is not finite: stop (the last checkpoint stays) |
  # skip (that step is left out, and counted).
  train.on_nonfinite = 'stop'
  # Steps that the devices are sent at a time. 0: 10 on a CPU, else up to 100.
  train.steps_per_dispatch = 0
  # Metrics are written at every multiple of this within an epoch, and at its
  # end.
  train.log_every_steps = 50

  config.eval = evaluation = ml_collections.ConfigDict()
  # Validation, pictures and a checkpoint; always after the last epoch.
  evaluation.every_epochs = 1
  evaluation.batch_size = 256

  config.checkpoint = checkpoint = ml_collections.ConfigDict()
  # How many of the best by val/loss are kept, besides the last two.
  checkpoint.keep_best = 2
  # Between the checkpoints at validations, one every so many minutes.
  checkpoint.every_minutes = 10.0

  return config
