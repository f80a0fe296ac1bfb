"""Compiles small programs for TPUs; prints what they are made of, as JSON.

Run by test_tpu_compile.py, in a process that may load the library of TPUs.
"""

import json
import re

from benchmarks import tpu_compile
from configs import celeba


def main():
  tpu_compile.prepare()
  one, host = map(tpu_compile.slice_of, ('v5e-1', 'v5e-8'))
  small = make_config(16)
  # The first three are copied in one or the other of the simpler layouts:
  # [N, height, width, channels], and with one axis for an image.
  cases = {
    'celeba': ('train', one, make_config(64), 162_770),
    'narrow': ('train', one, make_config(28, channels=1), 1_000_000),
    'wide': ('train', one, make_config(128), 20_000),
    'train': ('train', host, small, 1000),
    'eval': ('eval', host, small, 1000),
    'bound': ('bound', one, small, 1000),
    'sample': ('sample', one, small, 1000),
    'population': ('population', host, small, 1000),
  }
  for name, (program, tpus, config, num_images) in cases.items():
    compiled = tpu_compile.lower(program, tpus, config, 8, num_images, 2)
    print(json.dumps({'name': name, **facts(compiled.compile())}), flush=True)


def make_config(image_size, channels=3):
  config = celeba.get_config()
  config.data.image_size = image_size
  config.data.channels = channels
  config.model.hidden_channels = (4, 8)
  config.model.latent_dim = 3
  return config


def facts(compiled):
  text = compiled.as_text()
  header = text[: text.index('\n')]
  products = re.findall(r' (?:convolution|dot)\(.*', text)
  return {
    **tpu_compile.describe(compiled),
    'aliases': header.count('may-alias') + header.count('must-alias'),
    'products': len(products),
    'precise': sum('{highest,highest}' in line for line in products),
    'rounded': 'bf16[' in text,
    'double': 'f64[' in text,
  }


if __name__ == '__main__':
  main()
