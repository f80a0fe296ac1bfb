"""Writes a trained model into a folder that needs nothing of this repository.

  python export.py --workdir=logs/faces --output=model

The folder has the encoder and the decoder as programs of JAX (StableHLO) for
CPU, GPU and TPU and as ONNX, the parameters as safetensors, the config, and a
model card with the numbers that evaluate.py measured. With --web it is also a
page that decodes in the browser.
"""

import importlib.util
import pathlib
import shutil
import tempfile

from absl import flags
from etils import epath
import jax
import numpy as np

from exports import card, files, functions
from runs import command_line, run_flags
from vae import figures, paths
from vae.errors import UserError

for _flag in ('workdir', 'checkpoint', 'output'):
  flags.declare_key_flag(_flag)

# The formats, each with the package that it needs.
_PACKAGES = {'jax': 'jax', 'onnx': 'jax2onnx', 'safetensors': 'safetensors'}

# How programs are written, and the method of `vae.convolutions` in each.
_WRITERS = {
  'jax': (files.write_jax, 'native'),
  'onnx': (files.write_onnx, 'dilated'),
}

_FORMATS = flags.DEFINE_list(
  'formats', list(_PACKAGES), f'Some of {",".join(_PACKAGES)}.'
)
_NAME = flags.DEFINE_string(
  'name', None, "The model's name on the card; by default the workdir's."
)
_LICENCE = flags.DEFINE_string(
  'licence', '', 'The licence of the parameters, by its SPDX name: mit, say.'
)
_WEB = flags.DEFINE_string(
  'web',
  None,
  "The folder dist of npm's onnxruntime-web: adds it and index.html, a page "
  'that decodes in the browser.',
)

_PAGE = pathlib.Path(__file__).parent / 'exports' / 'index.html'

# Of ONNX Runtime for browsers, the part that runs on the processor.
_RUNTIME = (
  'ort.wasm.min.mjs',
  'ort-wasm-simd-threaded.mjs',
  'ort-wasm-simd-threaded.wasm',
)

# All files that depend on the flags.
_ALL = (
  *('encoder.jax', 'decoder.jax', 'encoder.onnx', 'decoder.onnx'),
  *('model.safetensors', 'index.html'),
  *(f'onnxruntime-web/{name}' for name in _RUNTIME),
)

# Images along a side of the card's samples.
_SIDE = 8


def main() -> None:
  """Checks the flags, and writes the folder."""
  _check_flags()
  # Programs name their source files without the folders of this machine.
  jax.config.update('jax_hlo_source_file_canonicalization_regex', '.*/')
  trained = run_flags.restore()
  folder = run_flags.output('exported', str(trained.step))
  _check_is_free(folder)
  # Aside first, so that a failure leaves an older folder as it is. Then no file
  # of an older export may stay beside the new ones.
  with tempfile.TemporaryDirectory() as aside:
    aside = pathlib.Path(aside)
    _write(aside, trained)
    for name in _ALL:
      if not (aside / name).exists() and (folder / name).exists():
        (folder / name).unlink()
        print(f'  {folder / name}, of an older export, is removed.')
    for path in sorted(aside.rglob('*')):
      if path.is_file():
        target = folder / path.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        paths.replace(target, path.read_bytes())
        print(f'  {target}')


def _check_is_free(folder: epath.Path) -> None:
  """Raises UserError if the files there are not those of an export."""
  for name in ('config.json', 'README.md', 'index.html', 'checkpoints'):
    if (folder / name).exists() and not (folder / 'latents.json').exists():
      raise UserError(
        f'--output={folder} holds {name}, and is not an export; name another '
        'folder.'
      )


def _check_flags() -> None:
  for name in _FORMATS.value:
    if name not in _PACKAGES:
      raise UserError(
        f'--formats has {name}; it is some of {", ".join(_PACKAGES)}.'
      )
    if importlib.util.find_spec(_PACKAGES[name]) is None:
      raise UserError(
        f'--formats has {name}, and {_PACKAGES[name]} is not installed; pip '
        'install -r exports/requirements.txt, or name --formats without it.'
      )
  if _WEB.value is not None:
    if 'onnx' not in _FORMATS.value:
      raise UserError('--web needs onnx among the --formats.')
    missing = [n for n in _RUNTIME if not pathlib.Path(_WEB.value, n).exists()]
    if missing:
      raise UserError(
        f'--web={_WEB.value}: there is no {missing[0]}; npm install '
        'onnxruntime-web makes node_modules/onnxruntime-web/dist.'
      )


def _write(folder: pathlib.Path, trained) -> None:
  for name, (write, convolution) in _WRITERS.items():
    if name in _FORMATS.value:
      for make in (functions.encoder, functions.decoder):
        print(f'{make.__name__}: {name} …', flush=True)
        write(folder, make(trained, convolution))
  parameters = files.parameters(trained)
  if 'safetensors' in _FORMATS.value:
    files.write_safetensors(folder, parameters, trained.step)
  files.write_config(folder, trained.config)
  files.write_latents(folder, trained)
  samples = figures.image_grid(trained.sample(_SIDE**2), _SIDE)
  figures.save_png(samples, folder / 'samples.png')
  if _WEB.value is not None:
    shutil.copy(_PAGE, folder / 'index.html')
    (folder / 'onnxruntime-web').mkdir()
    for name in _RUNTIME:
      shutil.copy(pathlib.Path(_WEB.value, name), folder / 'onnxruntime-web')
  text = card.write(
    trained,
    functions.encoder(trained, 'native'),
    sum(
      np.size(array)
      for name, array in parameters.items()
      if name.startswith('params.')
    ),
    _NAME.value or run_flags.workdir().name,
    _LICENCE.value,
    card.measured(run_flags.workdir(), trained.step),
    [*_FORMATS.value, *['web'] * (_WEB.value is not None)],
  )
  (folder / 'README.md').write_text(text)


if __name__ == '__main__':
  command_line.run(main)
