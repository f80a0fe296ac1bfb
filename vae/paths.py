"""Paths as users write them."""

from etils import epath


def expand(path: epath.PathLike) -> epath.Path:
  """The path with a leading `~` or `~USER` replaced by that home folder.

  A shell leaves the `~` of --workdir=~/runs as it is. A URL such as
  gs://BUCKET/runs, and a name that is no user's, stay too.
  """
  return epath.Path(path).expanduser()
