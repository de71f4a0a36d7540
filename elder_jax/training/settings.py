"""The settings of training, apart from learning gates."""

import dataclasses

from elder_jax.errors import InputError
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
  """How a model is trained. `seed` initialises the LoRA factors."""

  penalty: str = setting('l2', "Norm of a layer's update in the penalty.", choices=('l2', 'l1'), rare=True)
  penalty_scale: str = setting(
    'token',
    "token: mean over tokens of each token's norm. relative: the same, divided by the norm of the layer's input. "
    'none: norm over the whole batch.',
    choices=('token', 'relative', 'none'),
    rare=True,
  )
  lambda2: float = setting(1e-3, 'Weight of the penalty on the updates of the layers that will be removed.', least=0)
  lambda2_power: float = setting(
    0.0,
    'Ramp of lambda2: after the fraction f of the steps it is lambda2 * f^power; 0: constant, 1: linear, 2: quadratic.',
    least=0,
    rare=True,
  )
  order: str = setting(
    'sequential',
    'joint: penalise the chosen layers together; sequential: one by one, then skip each.',
    choices=('joint', 'sequential'),
  )
  anneal: float = setting(
    0.0,
    'Fraction of the steps of regularize over which the gates of the chosen layers fall from 1 to 0; 0: they stay at 1.',
    least=0,
    most=1,
    rare=True,
  )
  distill: tuple[float, ...] = setting(
    (0.0,),
    "Weight w of the KL divergence from the dense model's predictions, in all training. The LM loss has the weight 1 - w. "
    'START:END, such as 0.9:0.5, changes w along a cosine over the steps.',
    least=0,
    most=1,
    colon=True,
  )
  temperature: float = setting(
    1.0,
    'Temperature of both distributions in the KL divergence of --distill, which is multiplied by its square.',
    above=0,
    rare=True,
  )
  distill_hidden: float = setting(
    0.0,
    "Weight of the squared relative error between each layer's output and the dense model's, averaged over layers and "
    'tokens and added to the loss; 0: none.',
    least=0,
    rare=True,
  )
  steps: int | None = setting(
    None,
    'Training steps of the recipe; unset: one pass over the sequences.',
    flag='train_steps',
    least=0,
  )
  lr: float = setting(
    3e-4,
    'Peak learning rate. LoRA needs a higher one; lion needs one 3 to 10 times lower.',
    least=0,
  )
  lr_schedule: str = setting(
    'linear',
    'Learning-rate schedule after warm-up. linear and cosine decay from the peak to the last step; wsd stays at the '
    'peak and decays linearly over the last --decay_ratio of the steps.',
    choices=('linear', 'cosine', 'wsd'),
  )
  lr_final: float = setting(
    0.0, 'Learning rate at the end of the schedule, as a fraction of the peak.', least=0, most=1, rare=True
  )
  decay_ratio: float = setting(
    0.2,
    'Last fraction of the steps, over which --lr_schedule=wsd decays.',
    least=0,
    most=1,
    rare=True,
  )
  warmup_ratio: float = setting(
    0.05,
    'Fraction of the steps over which the learning rate warms up from 0.',
    least=0,
    below=1,
    rare=True,
  )
  weight_decay: float = setting(0.0, 'Weight decay of matrices.', least=0, rare=True)
  grad_clip: float = setting(1.0, 'Largest global norm of the gradient; a larger one is clipped.', above=0, rare=True)
  grad_accum: int = setting(1, 'Micro-batches per batch, to save memory; must divide --batch_size.', least=1)
  trainable: str = setting(
    'blocks',
    'blocks: train the weights of the layers; all: also embedding, final norm and head.',
    choices=('blocks', 'all'),
  )
  optimizer: str = setting(
    'adamw',
    'Optimiser of the training; stage 1 always uses Adam. Its float32 state per trained weight: adamw 8 bytes; lion 4; '
    'adafactor (factored, no momentum) almost none for matrices with two axes of 128 or more.',
    choices=('adamw', 'adafactor', 'lion'),
    rare=True,
  )
  moment_dtype: str = setting(
    'float32',
    'Type of the first moment of --optimizer=adamw and lion. bfloat16 saves 2 bytes per trained weight. Second moments '
    'and stage 1 always use float32.',
    choices=('float32', 'bfloat16'),
    rare=True,
  )
  lora_rank: int = setting(
    0,
    "Rank of LoRA in all training except stage 1; 0: no LoRA. Only a low-rank update of each of the layers' matrices is "
    'trained; everything else is frozen. The update is merged before pruning and export.',
    least=0,
  )
  lora_alpha: float | None = setting(
    None,
    "LoRA's update is alpha / rank times the product of its factors; unset: twice --lora_rank.",
    above=0,
    rare=True,
  )
  validate_every: int = setting(
    0,
    'Steps between measurements of the held-out loss; 0: none. It is also measured before the first step and after the '
    'last, each time on --validation_sequences sequences.',
    least=0,
  )
  export: str = setting(
    'last',
    'Which state to export: last, or best (lowest held-out loss; needs --validate_every).',
    choices=('last', 'best'),
  )
  seed: int = 0
  only: str = ''  # name of the only parameter of the layers that trains; empty: those of `trainable`

  def __post_init__(self):
    if isinstance(self.distill, int | float) and not isinstance(self.distill, bool):  # the same weight in all steps
      object.__setattr__(self, 'distill', (self.distill,))
    super().__post_init__()
    if len(self.distill) not in (1, 2):
      raise InputError(
        'distill', self.distill, 'must be one weight, or the weights at the start and at the end, as in 0.9:0.5.'
      )
    if self.optimizer == 'adafactor' and self.moment_dtype != 'float32':
      raise InputError(
        'moment_dtype',
        self.moment_dtype,
        '--optimizer=adafactor has no first moment; leave out --moment_dtype, or use adamw or lion.',
      )
    if self.export == 'best' and not self.validate_every:
      raise InputError('export', 'best', 'needs the held-out loss; give --validate_every as well.')
    if self.lora_rank and self.trainable == 'all':
      raise InputError(
        'lora_rank',
        self.lora_rank,
        "LoRA trains only the layers' matrices; use --trainable=blocks.",
      )
    if self.lora_alpha is not None and not self.lora_rank:
      raise InputError('lora_alpha', self.lora_alpha, 'needs --lora_rank; give both, or neither.')

  @property
  def trained(self) -> str:
    """What trains: the argument `what` of step.train_mask."""
    return self.only or ('lora' if self.lora_rank else self.trainable)

  @property
  def alpha(self) -> float:
    """LoRA's alpha."""
    return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

  @property
  def distils(self) -> bool:
    """Whether the loss of some step contains the KL divergence from a teacher's predictions."""
    return max(self.distill) > 0

  @property
  def taught(self) -> bool:
    """Whether a teacher runs in every step."""
    return self.distils or self.distill_hidden > 0

  @property
  def taught_by(self) -> str:
    """The name of the setting that needs a teacher, for errors; '' if none does."""
    return 'distill' if self.distils else 'distill_hidden' if self.taught else ''

  @property
  def sequential(self) -> bool:
    return self.order == 'sequential'
