"""A sheet of pictures for `evaluate.py`: for each caption, what every attention made of it."""

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

NAMES = {"softmax": "softmax", "linfusion": "LinFusion"}
CELL = 256  # pixels of a picture on the sheet
COLUMNS = 4
GAP, MARGIN = 8, 28
INK, PALE, PAPER = "#1d2330", "#5b6475", "#ffffff"


def contact_sheet(drawn: dict[str, Tensor], captions: list[str]) -> Image.Image:
    """Bands of four captions; in each band a row for every attention, and the captions below.

    Args:
        drawn: Attention -> `(n, 3, size, size)` uint8 pictures.
        captions: The `n` captions.
    """
    captions = captions[: len(next(iter(drawn.values())))]
    text, label = ImageFont.load_default(19), ImageFont.load_default(21)
    lines = [wrap(caption, text, CELL - 8) for caption in captions]
    columns = min(COLUMNS, len(captions))
    line_height = 25
    left = MARGIN + 34  # for the row's name, which is written upwards
    bands = [range(i, min(i + columns, len(captions))) for i in range(0, len(captions), columns)]
    heights = [
        len(drawn) * (CELL + GAP) + line_height * max(len(lines[i]) for i in band) + 32
        for band in bands
    ]
    width = left + columns * (CELL + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights) - 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for band, height in zip(bands, heights, strict=True):
        for row, (attention, pictures) in enumerate(drawn.items()):
            y = top + row * (CELL + GAP)
            name = upwards(NAMES[attention], label)
            sheet.paste(name, (MARGIN - 6, y + (CELL - name.height) // 2))
            for column, i in enumerate(band):
                sheet.paste(to_image(pictures[i]), (left + column * (CELL + GAP), y))
        y = top + len(drawn) * (CELL + GAP)
        for column, i in enumerate(band):
            for k, line in enumerate(lines[i]):
                x = left + column * (CELL + GAP) + CELL / 2
                draw.text((x, y + k * line_height), line, INK, text, anchor="ma")
        top += height
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    same = image.size == (CELL, CELL)
    return image if same else image.resize((CELL, CELL), Image.Resampling.BICUBIC)


def upwards(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The text as a picture, to be read from the bottom to the top."""
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (int(right - left) + 2, int(bottom - top) + 4), PAPER)
    ImageDraw.Draw(image).text((1 - left, 2 - top), text, PALE, font)
    return image.rotate(90, expand=True)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
