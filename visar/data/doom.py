"""Clips of a player walking through Doom levels, with the actions taken: drawn by ViZDoom (extra `doom`).

ViZDoom: arXiv 1605.02097. Levels are Freedoom's and ViZDoom's scenarios; both come with the package `vizdoom`. That
such clips train models of games is GameNGen's setting (arXiv 2408.14837); its clips come from a trained player, these
from random actions that are held for a while.
"""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from visar.core.noise import Noise, Use
from visar.data.clip_archives import FRAMES, SIZE, DrawnClip, build_shards
from visar.data.crops import center_crop
from visar.data.emoji_splits import unit_hash

SCENARIOS = (
    "basic",
    "deadly_corridor",
    "deathmatch",
    "defend_the_center",
    "defend_the_line",
    "health_gathering",
    "health_gathering_supreme",
    "my_way_home",
    "predict_position",
    "take_cover",
)
MAPS = {
    "freedoom1": tuple(f"E{episode}M{number}" for episode in range(1, 5) for number in range(1, 10)),
    "freedoom2": tuple(f"MAP{number:02d}" for number in range(1, 33)),
}
ACTIONS = ("stay", "forward", "back", "turn left", "turn right", "attack")
_BUTTONS = ("MOVE_FORWARD", "MOVE_BACKWARD", "TURN_LEFT", "TURN_RIGHT", "ATTACK")  # of the actions but the first
PLACES = (*SCENARIOS, *MAPS)
COLUMNS = {"class": list(PLACES), **{f"action{step:02d}": list(ACTIONS) for step in range(1, FRAMES)}}

_MAP_SHARE = 0.7  # of the clips are in maps of Freedoom, the others in scenarios
_HELD = 0.7  # probability that an action is held for another step
_FRAME_TICS = 6  # of 35 a second, between two frames
_MOST_WALK = 24  # steps before the first frame
_ATTEMPTS = 50  # episodes that end before their last frame are begun anew with other numbers


def split_of_map(place: str, level: str) -> int:
    """0 train, 1 val, 2 test: by a hash of the map's name; scenarios are for training."""
    if place not in MAPS:
        return 0
    share = unit_hash(f"doom:{place}:{level}")
    return 2 if share < 0.06 else 1 if share < 0.14 else 0


def _engine() -> Any:
    try:
        import vizdoom
    except ImportError as error:
        raise ImportError("clips of Doom need ViZDoom: pip install 'torch-visar[doom]'") from error
    return vizdoom


class _Games:
    """Running games, one per place; a game's episode depends on its map and seed alone."""

    def __init__(self) -> None:
        self._engine, self._stack = _engine(), contextlib.ExitStack()
        self._games: dict[str, Any] = {}

    def __enter__(self) -> "_Games":
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def begin(self, place: str, level: str, seed: int) -> Any:
        """A game at the beginning of an episode."""
        if place not in self._games:
            self._games[place] = self._start(place, level)
        game = self._games[place]
        if place in MAPS:
            game.set_doom_map(level)
        game.set_seed(seed)
        game.new_episode()
        return game

    def _start(self, place: str, level: str) -> Any:
        engine, game = self._engine, self._engine.DoomGame()
        package = Path(engine.__file__).parent
        if place in MAPS:
            game.set_doom_game_path(str(package / f"{place}.wad"))
        else:
            game.set_doom_game_path(str(package / "freedoom2.wad"))
            game.set_doom_scenario_path(str(package / "scenarios" / f"{place}.wad"))
        game.set_doom_map(level)
        game.set_doom_config_path(str(self._folder / f"{place}.ini"))
        game.set_screen_resolution(engine.ScreenResolution.RES_160X120)
        game.set_screen_format(engine.ScreenFormat.RGB24)
        for what in ("hud", "crosshair", "decals", "particles", "messages"):
            getattr(game, f"set_render_{what}")(False)
        game.set_available_buttons([getattr(engine.Button, name) for name in _BUTTONS])
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_mode(engine.Mode.PLAYER)
        game.set_episode_start_time(10)
        game.set_episode_timeout(0)
        game.init()
        self._stack.callback(game.close)
        return game


def _step(game: Any, action: int) -> None:
    game.make_action([int(button + 1 == action) for button in range(len(_BUTTONS))], _FRAME_TICS)


def _draw_clip(games: _Games, seed: int, number: int) -> DrawnClip:
    for attempt in range(_ATTEMPTS):
        # Which place, which map, how far to walk, the episode's seed; then for every step whether to hold, and what.
        head, body = 4, 2 * (_MOST_WALK + FRAMES)
        drawn = Noise([seed]).uniform(Use.CLIP, number, (head + body,), counter=attempt)[0].tolist()
        kind = drawn[0] / _MAP_SHARE if drawn[0] < _MAP_SHARE else (drawn[0] - _MAP_SHARE) / (1.0 - _MAP_SHARE)
        names = tuple(MAPS) if drawn[0] < _MAP_SHARE else SCENARIOS
        place = names[min(int(kind * len(names)), len(names) - 1)]
        levels = MAPS.get(place, ("map01",))
        level = levels[int(drawn[1] * len(levels))]
        walk = int(drawn[2] * (_MOST_WALK + 1))
        action, actions = 1, []
        for hold, which in zip(drawn[head::2], drawn[head + 1 :: 2], strict=True):
            action = action if hold < _HELD else int(which * len(ACTIONS))
            actions.append(action)
        game = games.begin(place, level, int(drawn[3] * 2**23))
        frames = _record(game, actions[:walk], actions[_MOST_WALK : _MOST_WALK + FRAMES - 1])
        if frames is not None:
            labels = (PLACES.index(place), *actions[_MOST_WALK : _MOST_WALK + FRAMES - 1])
            return DrawnClip(frames, labels, "", split_of_map(place, level))
    raise ValueError(f"clip {number} of seed {seed}: {_ATTEMPTS} episodes ended before {FRAMES} frames")


def _record(game: Any, before: Sequence[int], actions: Sequence[int]) -> np.ndarray | None:
    """Frames of an episode, one before every action and one after the last; None where it ends before that."""
    for action in before:
        if game.is_episode_finished():
            return None
        _step(game, action)
    frames = []
    for number in range(len(actions) + 1):
        if number:
            _step(game, actions[number - 1])
        state = game.get_state()
        if state is None:
            return None
        image = PIL.Image.fromarray(np.ascontiguousarray(state.screen_buffer))
        frames.append(np.asarray(center_crop(image, SIZE)))
    return np.stack(frames)


def draw_doom(seed: int, numbers: Sequence[int]) -> list[DrawnClip]:
    """Clips of a set, each a function of the set's seed and of its number.

    Raises:
        ImportError: ViZDoom is not installed.
        ValueError: a clip's episodes all end too early.
    """
    with _Games() as games:
        return [_draw_clip(games, seed, number) for number in numbers]


def build_doom(out: Path, count: int, seed: int = 0, processes: int = 1) -> list[Path]:
    """Makes a folder of clips of Doom, or completes it; see `build_shards`.

    Raises:
        ImportError: ViZDoom is not installed.
        ValueError: see `build_shards`.
    """
    _engine()
    return build_shards(out, count=count, seed=seed, kind="doom", columns=COLUMNS, draw=draw_doom, processes=processes)
