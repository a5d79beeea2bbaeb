"""The demo's twelve retrieval tasks in M-BEIR's shapes: prompts, edit wordings and question templates.

Templates never name an entity: only the picture (tasks 6 and 8) or the human text answers the question.
"""

from itertools import chain

DATASET_IDS = {"emoji": 20, "keywords": 21, "wiki": 22, "clipart": 23, "flags": 24}

MODALITIES = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}

PROMPTS = {
    "emoji_task0": [
        "Find an emoji that shows the following description.",
        "Show me the emoji drawing that matches these words.",
        "Which emoji picture fits this text best?",
        "I want to retrieve an emoji image of this description.",
    ],
    "emoji_task3": [
        "Find the words that describe this emoji.",
        "What is the name of the emoji in the picture?",
        "Retrieve the label and tags that belong to the shown emoji.",
        "I want to locate the description of this emoji image.",
    ],
    "emoji_task4": [
        "Find the same emoji drawn by another artist.",
        "Which picture shows the same emoji in a different style?",
        "Retrieve another drawing of the emoji in this image.",
        "Identify the emoji image that means the same as this one.",
    ],
    "emoji_task7": [
        "Find the emoji like this one but with the change asked for.",
        "With the reference emoji and the modification, identify the matching emoji.",
        "Retrieve the emoji image that results from this edit.",
        "I want a similar emoji with the described change.",
    ],
    "keywords_task1": [
        "Find the keywords that people use for this emoji name.",
        "Retrieve a list of search words for the following emoji.",
        "Which keywords go with this label?",
        "I want to find related words for this emoji.",
    ],
    "wiki_task1": [
        "Retrieve the encyclopedia paragraph that matches this short description.",
        "Find an encyclopedia entry about the subject described here.",
        "Which encyclopedia text does this description belong to?",
        "I am looking for the encyclopedia paragraph with this summary.",
    ],
    "wiki_task2": [
        "Find an encyclopedia entry with a picture that answers this question.",
        "Retrieve the illustrated paragraph that gives the answer to the question.",
        "I want to know the answer to this question. Please find the picture and text for me.",
        "Identify the image and paragraph that answer the following question.",
    ],
    "wiki_task6": [
        "Retrieve an encyclopedia paragraph that answers the question about this image.",
        "Find the text that explains what the picture shows.",
        "I want to find a paragraph that answers my question about this picture.",
        "Determine the encyclopedia text that identifies the subject of the image.",
    ],
    "wiki_task8": [
        "Find another picture with a paragraph that answers the question about this image.",
        "Retrieve an image and text pair about the subject of this picture.",
        "I want to know the subject of the image. Can you provide an illustrated encyclopedia entry?",
        "Determine the illustrated entry that answers my question about this image.",
    ],
    "clipart_task0": [
        "Find a clip-art picture with this title.",
        "Show me the clip-art drawing that fits the following words.",
        "Which clip-art matches this title and keywords?",
        "I want to retrieve a clip-art image of this subject.",
    ],
    "clipart_task3": [
        "Find the title of this clip-art.",
        "Retrieve the title and keywords that describe the drawing.",
        "Which words belong to this clip-art picture?",
        "I want to locate the text that describes this drawing.",
    ],
    "flags_task4": [
        "Find the same flag drawn by another artist.",
        "Which picture shows the flag of the same country?",
        "Retrieve another image of this flag.",
        "Identify the flag image that stands for the same place.",
    ],
}

TONE_EDITS = ["with {} skin tone", "change the skin tone to {}", "the same with {} skin"]
GENDER_EDITS = ["as a {}", "show a {} instead", "the same, but a {}"]
NEUTRAL_EDITS = ["as a person of no stated gender", "gender neutral", "neither man nor woman"]
STYLE_EDITS = {
    "google": ["in the softly shaded style", "drawn with soft gradients", "as a shaded drawing"],
    "twitter": ["in the flat style", "drawn in flat colours", "as a flat drawing"],
    "fluent": ["in the 3D style", "rendered in three dimensions", "as a glossy 3D model"],
}

DESCRIPTION_QUESTIONS = [
    "What is this: {}?",
    "What is the name for the following: {}?",
    "Which subject is described as: {}?",
    "What would you call this: {}?",
]
PICTURE_QUESTIONS = [
    "What {} is this?",
    "Which {} does the picture show?",
    "Can you tell me about this {}?",
    "What is known about the {} in the picture?",
]

NOUNS = {
    "animal": "animal",
    "plant": "plant",
    "food": "food",
    "drink": "drink",
    "dishware": "object",
    "place": "place",
    "transport": "vehicle",
    "hotel": "object",
    "time": "object",
    "sky": "thing in the sky",
    "event": "object",
    "sport": "sport",
    "game": "game",
    "clothing": "garment",
    "musical": "instrument",
    "country": "country or territory",
    "subdivision": "place",
    "animals": "animal",
    "plants": "plant",
    "buildings": "building",
    "transportation": "vehicle",
    "tools": "tool",
    "science": "thing",
    "geography": "place",
}


def noun_for(category: str) -> str:
    """A general noun for an emoji subgroup ('animal-bird') or a clip-art folder: 'animal', 'tool', … or 'thing'."""
    return NOUNS.get(category.split("-")[0], "thing")


def dataset_and_task(task: str) -> tuple[str, int]:
    dataset, number = task.split("_task")
    return dataset, int(number)


def template_texts() -> list[str]:
    """All our own wordings that a row can contain; no held-out concept may have a name that occurs in them."""
    edits = [*TONE_EDITS, *GENDER_EDITS, *NEUTRAL_EDITS, *chain(*STYLE_EDITS.values())]
    words = ["light", "medium-light", "medium", "medium-dark", "dark", "man", "woman", "person"]
    filled = [edit.format(word) for edit in edits for word in words]
    asked = [question.format(noun) for question in PICTURE_QUESTIONS for noun in [*NOUNS.values(), "thing"]]
    return [*filled, *asked, *DESCRIPTION_QUESTIONS, *chain(*PROMPTS.values())]
