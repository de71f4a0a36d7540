"""Memory: how much a process may use, and freeing arrays that are still referenced."""

import os
import pathlib

import jax


def total(root: pathlib.Path = pathlib.Path('/')) -> int:
  """Memory available to this process, in bytes: that of the machine, or the lowest limit of its control groups.

  Containers and jobs set such limits. root: the file system to read, for tests.
  """
  limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  groups = root / 'proc/self/cgroup'
  for line in groups.read_text().splitlines() if groups.exists() else []:
    _, controllers, group = line.split(':', 2)
    if not controllers:  # version 2, alone or alongside version 1
      mounts, name = ('sys/fs/cgroup', 'sys/fs/cgroup/unified'), 'memory.max'
    elif 'memory' in controllers.split(','):
      mounts, name = ('sys/fs/cgroup/memory',), 'memory.limit_in_bytes'
    else:
      continue
    # Parent groups limit this one too. In a container, the path is often the host's, but only its own group is mounted,
    # at the top.
    path = pathlib.PurePosixPath(group.lstrip('/'))
    for file in (root / mount / parent / name for mount in mounts for parent in (path, *path.parents)):
      if file.is_file() and (limit := file.read_text().strip()).isdecimal():  # "max" means no limit
        limits.append(int(limit))
  return min(limits)


def free(tree, spare=()):
  """Frees the device memory of a tree's arrays at once, even if they are referenced, except arrays also in `spare`."""
  spared = {id(array) for array in jax.tree.leaves(spare)}
  for array in jax.tree.leaves(tree):
    if id(array) not in spared:
      array.delete()
