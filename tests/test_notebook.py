import os

import nbclient
import nbformat
import pytest

from tests.conftest import ROOT


@pytest.fixture(scope='module')
def executed(trained_run):
  notebook = nbformat.read(ROOT / 'docs/trained_model.ipynb', as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=120, resources={'metadata': {'path': ROOT / 'docs'}}
  )
  client.execute(env=dict(os.environ, WORKDIR=str(trained_run)))
  return notebook


def test_runs_from_top_to_bottom(executed):
  outputs = [
    output
    for cell in executed.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  ]
  kinds = [output.output_type for output in outputs]
  assert 'error' not in kinds
  # Nothing is printed on standard error.
  assert not [o for o in outputs if o.get('name') == 'stderr']
  pictures = [o for o in outputs if 'image/png' in o.get('data', {})]
  assert len(pictures) == 4
  text = ''.join(o.text for o in outputs if o.output_type == 'stream')
  assert '(200, 2) (200, 2)' in text and '2 latent dimensions' in text
