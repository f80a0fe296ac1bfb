"""Seconds until the explorer's page can be used, and its sliders' delay.

  python benchmarks/explorer.py --workdir=logs/faces

Each round starts explore.py, opens its page in headless Chromium, and waits for
the image and the map. Then a slider moves, again and again; the delay is from
its event to the pixels of the new image on the page.
"""

import argparse
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from playwright import sync_api

from benchmarks import results

_ROOT = pathlib.Path(__file__).resolve().parents[1]

# Moves the first slider, and waits for the answer that draws the image.
_MOVE = """async (share) => {
  const slider = document.querySelector('#dimensions input');
  const low = Number(slider.min), high = Number(slider.max);
  const timing = document.getElementById('timing');
  timing.textContent = '';
  const began = performance.now();
  slider.value = low + share * (high - low);
  slider.dispatchEvent(new Event('input', { bubbles: true }));
  while (!timing.textContent) await new Promise(requestAnimationFrame);
  return performance.now() - began;
}"""


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  content = results.begin(args)
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=shutil.which('chromium'), args=['--no-sandbox']
    )
    rounds = [_measure(browser, args) for _ in range(args.rounds)]
  delays = np.concatenate([row['milliseconds'] for row in rounds])
  names = {'image': 'the image is there', 'map': 'the map is there'}
  lines = [
    [f'seconds until {text}', *_spread([row[name] for row in rounds])]
    for name, text in names.items()
  ]
  lines.append(['milliseconds from slider to image', *_spread(delays)])
  print(results.table(['', 'median', 'nine tenths within'], lines))
  results.write(args.output, content | {'rounds': rounds})


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument('--workdir', required=True, help='of a trained run')
  parser.add_argument('--rounds', type=int, default=5, help='(5)')
  parser.add_argument('--moves', type=int, default=60, help='of a round (60)')
  return results.parse(parser, rounds=1, moves=3)


def _spread(values) -> list[str]:
  return [
    results.significant(statistics.median(values)),
    results.significant(float(np.quantile(values, 0.9))),
  ]


def _measure(browser: sync_api.Browser, args) -> dict[str, object]:
  began = time.monotonic()
  command = [sys.executable, str(_ROOT / 'explore.py'), '--port=0']
  with subprocess.Popen(
    [*command, f'--workdir={args.workdir}'], stdout=subprocess.PIPE, text=True
  ) as process:
    try:
      lines = (re.match(r'Open (\S+)', line) for line in process.stdout)
      address = next(filter(None, lines))[1]
      page = browser.new_page()
      page.goto(address)
      page.wait_for_selector('#timing:not(:empty)')
      found = {'image': time.monotonic() - began}
      page.wait_for_selector('#map:not([hidden])', timeout=600_000)
      found['map'] = time.monotonic() - began
      shares = np.random.default_rng(0).random(args.moves)
      found['milliseconds'] = [page.evaluate(_MOVE, s) for s in shares]
      page.close()
    finally:
      process.send_signal(signal.SIGINT)
  return found


if __name__ == '__main__':
  main()
