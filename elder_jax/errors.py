"""The one exception that a user's own input can cause."""


class InputError(Exception):
  """Bad input, told in one sentence that names the flag, file or tensor and the mend.

  `main` prints it without a traceback and leaves with exit status 2.
  """
