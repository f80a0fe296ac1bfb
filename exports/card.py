"""The model card: description, usage, measured numbers."""

from collections.abc import Sequence
import json
import pathlib
import string
from typing import Any

from etils import epath

from evaluation import output
from evaluation.html_page import number
from exports.functions import Function
from vae import distributions
from vae.loading import TrainedVAE

_TEMPLATE = pathlib.Path(__file__).with_suffix('.md')

_PROGRAMS = """| | takes | gives |
| --- | --- | --- |
| `encoder` | images, float32 [n, $image] in [0, 1]$labels | $posterior of z |
| `decoder` | z, float32 [n, $shape]$labels | mean images, cut to [0, 1] |

"""

# How each format is used.
_USES = {
  'jax': """With JAX, on a CPU, a GPU or a TPU:

```python
import json
import pathlib

import jax
import numpy as np

latents = json.loads(pathlib.Path('latents.json').read_text())
z = np.array(latents['draws'][:16], np.float32)  # Of the prior.
z = z.reshape(-1, *latents['latent_shape'])


def load(name):
  return jax.export.deserialize(bytearray(pathlib.Path(name).read_bytes()))


(images,) = load('decoder.jax').call(z$positional)
$outputs = load('encoder.jax').call(images$positional)
```

""",
  'onnx': """With ONNX Runtime, and z as above or drawn from the prior:

```python
import onnxruntime

decoder = onnxruntime.InferenceSession('decoder.onnx')
(images,) = decoder.run(['images'], {'z': z$named})
encoder = onnxruntime.InferenceSession('encoder.onnx')
$outputs = encoder.run([$names], {'images': images$named})
```

""",
  'web': """In a browser: `python -m http.server` in this folder, then
<http://localhost:8000>.

""",
  'safetensors': """The parameters by name are in `model.safetensors`.

""",
}


def measured(workdir: epath.Path, step: int) -> list[dict[str, Any]]:
  """The contents of each `metrics.json` of a checkpoint in a workdir."""
  contents = [
    json.loads(path.read_text())
    for path in sorted(workdir.glob(f'evaluation/*/{output.METRICS}'))
  ]
  return [content for content in contents if content['step'] == step]


def write(
  trained: TrainedVAE,
  encoder: Function,
  num_parameters: int,
  name: str,
  licence: str,
  measurements: list[dict[str, Any]],
  formats: Sequence[str],
) -> str:
  """The card, Markdown with the front matter of the Hugging Face hub.

  `formats` are those that the folder has: jax, onnx, web, safetensors.
  """
  height, width, channels = trained.model.image_shape
  is_conditional = 'labels' in encoder.inputs
  prior = trained.prior
  is_normal = isinstance(prior, distributions.StandardNormal)
  shape = ', '.join(map(str, trained.latent_shape))
  label = 'np.zeros(16, np.int32)'
  values = {
    'image': f'{height}, {width}, {channels}',
    'shape': shape,
    'posterior': ' and '.join(encoder.outputs),
    'labels': '; labels, int32 [n]' if is_conditional else '',
    'positional': f', {label}' if is_conditional else '',
    'named': f", 'labels': {label}" if is_conditional else '',
    'outputs': ', '.join(encoder.outputs)
    if len(encoder.outputs) > 1
    else '(mean,)',
    'names': ', '.join(map(repr, encoder.outputs)),
  }
  template = string.Template(_TEMPLATE.read_text())
  return template.substitute(
    license=licence or 'other',
    licence=licence or 'not stated.',
    name=name,
    height=height,
    width=width,
    channels='1 channel' if channels == 1 else f'{channels} channels',
    tags=', onnx' if 'onnx' in formats else '',
    step=f'{trained.step:,}',
    network=trained.config.model.name,
    objective=trained.config.objective.name,
    parameters=f'{num_parameters:,}',
    shape=shape,
    prior='N(0, I)'
    if is_normal
    else f'a {type(prior).__name__}, draws of which are in `latents.json`',
    programs=string.Template(_PROGRAMS).substitute(values)
    if {'jax', 'onnx'} & set(formats)
    else '',
    uses=''.join(
      string.Template(text).substitute(values)
      for name, text in _USES.items()
      if name in formats
    ),
    measured='\n'.join(map(_table, measurements))
    or 'Nothing: `evaluate.py` has not measured this checkpoint.\n',
  )


def _table(content: dict[str, Any]) -> str:
  """The numbers of a `metrics.json`, as Markdown."""
  lines = [
    f'On {content["num_images"]:,} {content["split"]} images; ± is the '
    'standard error over the choice of images, but for shares in holes the '
    'deviation over halvings of the draws.\n',
    '| | value | unit |',
    '| --- | ---: | --- |',
  ]
  for name, metric in content['metrics'].items():
    value, error = metric['value'], metric.get('standard_error')
    shown = '–' if value is None else number(value, error)
    lines.append(f'| {name} | {shown} | {metric["unit"]} |')
  return '\n'.join(lines) + '\n'
