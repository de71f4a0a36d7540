"""Memory: how much a process may have, and giving arrays back before the last reference to them goes."""

import os
import pathlib

import jax


def total(root: pathlib.Path = pathlib.Path('/')) -> int:
  """Bytes that the machine has, or the least that a control group over this process (a container, a job) allows."""
  limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  groups = root / 'proc/self/cgroup'
  for line in groups.read_text().splitlines() if groups.exists() else []:
    _, controllers, group = line.split(':', 2)
    if not controllers:  # version 2, on its own or beside version 1
      mounts, name = ('sys/fs/cgroup', 'sys/fs/cgroup/unified'), 'memory.max'
    elif 'memory' in controllers.split(','):
      mounts, name = ('sys/fs/cgroup/memory',), 'memory.limit_in_bytes'
    else:
      continue
    # The groups above limit this one, too; in a container the path is often that of the host, of which only the top is
    # seen, mounted as the container's own.
    path = pathlib.PurePosixPath(group.lstrip('/'))
    for file in (root / mount / parent / name for mount in mounts for parent in (path, *path.parents)):
      if file.is_file() and (limit := file.read_text().strip()).isdecimal():  # else max
        limits.append(int(limit))
  return min(limits)


def free(tree, spare=()):
  """Gives the arrays of a tree back to their devices now, whoever still refers to them, but not those also in `spare`."""
  spared = {id(array) for array in jax.tree.leaves(spare)}
  for array in jax.tree.leaves(tree):
    if id(array) not in spared:
      array.delete()
