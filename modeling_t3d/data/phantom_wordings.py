# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The words of the phantoms' reports, and the prompts that evaluation uses, whose sentences no report contains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How reports speak of one finding.

    Fields in braces are filled from the phantom: degree, side, sides (both sides as an adverb), size, place, count.

    Args:
        region (`str`): the part of the report that it belongs to, a key of `REGIONS`.
        one (`tuple[str, ...]`): sentences about a single occurrence.
        many (`tuple[str, ...]`): sentences about several occurrences; empty where the finding has only one.
        summary (`tuple[str, ...]`): short forms for the impression.
        absent (`tuple[str, ...]`): its names after a negation.
        degrees (`tuple[str, str, str]`): words for mild, moderate and severe.
    """

    region: str
    one: tuple[str, ...]
    many: tuple[str, ...]
    summary: tuple[str, ...]
    absent: tuple[str, ...]
    degrees: tuple[str, str, str] = ("mild", "moderate", "severe")


WORDINGS: dict[str, Wording] = {
    "emphysema": Wording(
        "lungs",
        (
            "{degree} emphysema, worst in the upper lobes.",
            "Both lungs show {degree} emphysematous change.",
            "There is {degree} centrilobular emphysema with hyperinflation.",
            "Lungs are hyperinflated with {degree} emphysema and flattened diaphragms.",
            "Low attenuation areas throughout both lungs, in keeping with {degree} emphysema.",
            "Scattered bullae and {degree} pulmonary emphysema.",
        ),
        (),
        ("{degree} emphysema.", "Emphysema, {degree}.", "{degree} emphysematous lung disease."),
        ("emphysema", "emphysematous change", "bullae"),
    ),
    "pleural effusion": Wording(
        "pleura",
        (
            "{degree} {side} pleural effusion.",
            "There is a {degree} {side} pleural effusion measuring {size} in thickness.",
            "{side} pleural effusion of {degree} volume, {size} deep.",
            "A {degree} amount of pleural fluid layers {sides}.",
            "Fluid in the pleural space {sides}, {degree} in amount.",
            "Pleural effusion seen {sides}, {degree}.",
        ),
        (),
        ("{degree} {side} pleural effusion.", "{side} pleural effusion.", "Pleural effusion {sides}, {degree}."),
        ("pleural effusion", "pleural fluid", "effusion"),
        ("small", "moderate", "large"),
    ),
    "cardiomegaly": Wording(
        "heart",
        (
            "The heart is {degree} enlarged.",
            "There is {degree} cardiac enlargement, transverse diameter {size}.",
            "Cardiomegaly, {degree} in extent.",
            "Enlarged cardiac silhouette compatible with cardiomegaly.",
            "Heart size is increased with {degree} cardiomegaly.",
        ),
        (),
        ("Cardiomegaly.", "Enlarged heart.", "{degree} cardiomegaly."),
        ("cardiomegaly", "cardiac enlargement", "enlargement of the heart"),
        ("mildly", "moderately", "markedly"),
    ),
    "consolidation": Wording(
        "lungs",
        (
            "Consolidation in the {place} with air bronchograms.",
            "There is {degree} consolidation of the {place}.",
            "The {place} shows airspace consolidation measuring {size}.",
            "Dense airspace opacity in the {place}, consistent with consolidation.",
            "{degree} {side} lung consolidation, centred on the {place}.",
        ),
        (
            "Consolidation in the {places}.",
            "Bilateral airspace consolidation, involving the {places}.",
            "Multifocal consolidation affects the {places} with air bronchograms.",
        ),
        ("Consolidation in the {place}.", "{side} lung consolidation.", "Airspace consolidation, {place}."),
        ("consolidation", "airspace consolidation", "focal airspace opacity"),
        ("limited", "moderate", "extensive"),
    ),
    "ascites": Wording(
        "peritoneum",
        (
            "{degree} volume ascites.",
            "There is {degree} free fluid in the abdomen.",
            "Ascites along both flanks and around the liver, {degree} in amount.",
            "{degree} amount of perihepatic and paracolic fluid, in keeping with ascites.",
            "Free intraperitoneal fluid up to {size} thick, {degree} ascites.",
        ),
        (),
        ("{degree} ascites.", "Ascites.", "Free abdominal fluid, {degree} in amount."),
        ("ascites", "free fluid", "free intraperitoneal fluid"),
        ("small", "moderate", "large"),
    ),
    "hepatic steatosis": Wording(
        "liver",
        (
            "Diffusely decreased attenuation of the liver, in keeping with hepatic steatosis.",
            "There is {degree} hepatic steatosis.",
            "The liver is fatty, of lower density than the spleen.",
            "{degree} fatty infiltration of the liver.",
            "Low density liver parenchyma from {degree} steatosis.",
        ),
        (),
        ("{degree} hepatic steatosis.", "Fatty liver.", "Hepatic steatosis."),
        ("hepatic steatosis", "fatty infiltration of the liver", "steatosis"),
    ),
    "lung nodule": Wording(
        "lungs",
        (
            "{size} lung nodule in the {place}.",
            "There is a solid pulmonary nodule in the {place} measuring {size}.",
            "A {side} lung nodule of {size} lies in the {place}.",
            "Solid nodule, {size}, {place}.",
            "The {place} contains a {size} pulmonary nodule.",
        ),
        (
            "{count} lung nodules, the largest {size} in the {place}.",
            "Multiple pulmonary nodules; the dominant one is in the {place} and measures {size}.",
            "There are {count} solid lung nodules, up to {size}, for example in the {place}.",
        ),
        ("{size} {place} nodule.", "{side} lung nodule, {size}.", "Pulmonary nodule in the {place}."),
        ("lung nodule", "pulmonary nodule", "suspicious nodule", "nodules"),
    ),
    "liver cyst": Wording(
        "liver",
        (
            "{size} simple cyst in the {place}.",
            "Well defined hepatic cyst of {size} in the {place}.",
            "There is a liver cyst measuring {size}, {place}.",
            "The {place} contains a {size} cyst.",
        ),
        (
            "{count} hepatic cysts, the largest {size} in the {place}.",
            "Several simple liver cysts up to {size}.",
            "Multiple well defined liver cysts; the largest in the {place} measures {size}.",
        ),
        ("Simple liver cyst.", "Hepatic cyst, {size}.", "Benign cyst in the {place}."),
        ("liver cyst", "hepatic cyst", "cystic liver lesion"),
    ),
    "liver metastasis": Wording(
        "liver",
        (
            "Ill defined hypodense lesion of {size} in the {place}, suspicious for metastasis.",
            "{size} liver metastasis in the {place}.",
            "There is a hepatic metastasis measuring {size} in the {place}.",
        ),
        (
            "{count} hypodense liver metastases, the largest {size} in the {place}.",
            "Multiple hepatic metastases up to {size}.",
            "Several ill defined liver lesions consistent with metastasis, measuring up to {size}, {place}.",
            "Liver metastases in both appearance and number; dominant lesion {size} in the {place}.",
        ),
        ("Liver metastases.", "Hepatic metastasis, up to {size}.", "Findings of metastatic liver disease."),
        ("liver metastasis", "hepatic metastases", "suspicious liver lesion"),
    ),
    "kidney cyst": Wording(
        "kidneys",
        (
            "{size} cyst at the {place}.",
            "Cortical renal cyst on the {side}, {size}.",
            "There is a {side} kidney cyst measuring {size}.",
            "Simple cyst of {size} arising from the {place}.",
        ),
        (
            "Bilateral renal cysts up to {size}.",
            "Simple kidney cysts on both sides, the largest {size} at the {place}.",
        ),
        ("{side} renal cyst.", "Simple kidney cyst, {size}.", "Renal cyst, {side}."),
        ("renal cyst", "kidney cyst"),
    ),
    "kidney stone": Wording(
        "kidneys",
        (
            "{size} calculus in the {place}.",
            "Non-obstructing {side} kidney stone of {size}.",
            "There is a {size} stone in the {place}.",
            "{side} renal calculus measuring {size}.",
        ),
        (
            "Bilateral renal calculi up to {size}.",
            "Kidney stones on both sides, the largest {size} in the {place}.",
        ),
        ("{side} kidney stone.", "Nephrolithiasis, {side}.", "{size} {side} renal calculus."),
        ("kidney stone", "renal calculus", "nephrolithiasis"),
    ),
    "coronary calcification": Wording(
        "heart",
        (
            "Calcification of the {place}.",
            "There is coronary artery calcification in the {place}.",
            "Calcified plaque in the {place}.",
            "Coronary calcification seen along the {place}.",
        ),
        (
            "Coronary artery calcifications, involving the {places}.",
            "Multiple calcified plaques in the coronary arteries, including the {place}.",
            "Coronary calcification affecting the {places}.",
        ),
        ("Coronary artery calcification.", "Coronary calcification.", "Coronary atherosclerosis."),
        ("coronary calcification", "coronary artery calcification"),
    ),
    "aortic calcification": Wording(
        "aorta",
        (
            "Calcified plaque of the {place}.",
            "There is aortic calcification in the {place}.",
            "Focal calcification in the wall of the {place}.",
            "Atherosclerotic calcification of the aorta, {place}.",
        ),
        (
            "Aortic wall calcifications, involving the {places}.",
            "Multiple calcified plaques of the aorta, for example in the {place}.",
            "Atherosclerotic aortic calcification of the {places}.",
        ),
        ("Aortic calcification.", "Aortic atherosclerosis.", "Calcified plaques of the aorta."),
        ("aortic calcification", "aortic wall calcification", "aortic atherosclerosis"),
    ),
    "lymphadenopathy": Wording(
        "nodes",
        (
            "Enlarged {place} lymph node, {size}.",
            "{place} lymphadenopathy measuring {size}.",
        ),
        (
            "Enlarged lymph nodes at {places} stations, up to {size}.",
            "Lymphadenopathy, largest node {place}, {size}.",
            "There are {count} enlarged lymph nodes, the largest {size} in {place} position.",
            "{places} lymphadenopathy, with nodes up to {size}.",
        ),
        ("Lymphadenopathy.", "Enlarged lymph nodes up to {size}.", "{place} lymphadenopathy."),
        ("lymphadenopathy", "enlarged lymph nodes", "adenopathy"),
    ),
}

# For each region: its headings, and statements that hold when nothing is found there; those after "+" always hold.
REGIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lungs": (
        ("Lungs", "Lung parenchyma", "Lungs and airways"),
        (
            "The lungs are clear.",
            "Lungs are well aerated.",
            "Clear lung parenchyma on both sides.",
            "+The trachea and main bronchi are patent.",
            "+Central airways are normal.",
        ),
    ),
    "pleura": (
        ("Pleura", "Pleural spaces"),
        ("Pleural spaces are clear.", "The pleura is unremarkable.", "+No pneumothorax."),
    ),
    "heart": (
        ("Heart", "Cardiac"),
        (
            "The heart is of normal size.",
            "Heart unremarkable.",
            "Normal cardiac appearance.",
            "+No pericardial fluid.",
        ),
    ),
    "aorta": (
        ("Vessels", "Aorta"),
        (
            "The aorta is unremarkable.",
            "Normal aorta.",
            "+Aorta of normal calibre.",
            "+The great vessels are normal in course.",
        ),
    ),
    "nodes": (
        ("Mediastinum", "Lymph nodes"),
        ("Mediastinal contours are normal.", "Lymph nodes are of normal size.", "+The oesophagus is unremarkable."),
    ),
    "liver": (
        ("Liver", "Liver and biliary system", "Hepatobiliary"),
        (
            "The liver is normal.",
            "Liver of homogeneous normal density.",
            "Unremarkable liver.",
            "+The gallbladder is normal.",
            "+No biliary dilatation.",
        ),
    ),
    "kidneys": (
        ("Kidneys", "Kidneys and ureters", "Genitourinary"),
        (
            "The kidneys are normal.",
            "Kidneys unremarkable.",
            "Both kidneys are of normal appearance.",
            "+No hydronephrosis.",
        ),
    ),
    "peritoneum": (("Peritoneum", "Abdominal cavity"), ("The peritoneal cavity is clear.", "+No free air.")),
    "other": (
        ("Other", "Remaining organs", "Bones and soft tissues"),
        (
            "+The spleen is unremarkable.",
            "+Pancreas and adrenal glands are normal.",
            "+No acute bony abnormality.",
            "+Degenerative change of the spine.",
            "+Bowel loops are of normal calibre.",
            "+Soft tissues are unremarkable.",
        ),
    ),
}

# Around the names of absent findings, one or several.
NEGATIONS = (
    "No {names}.",
    "No evidence of {names}.",
    "There is no {names}.",
    "{names} not seen.",
    "No {names} identified.",
    "Without {names}.",
    "Absent: {names}.",
    "Not present: {names}.",
    "No sign of {names} on either side.",
)
AFFIRMATIONS = ("{name} noted.", "Present: {name}.", "Evidence of {name} as above.", "Study positive: {name}.")
TECHNIQUES = {
    "non-contrast": ("Study without intravenous contrast.", "Non-contrast examination of the patient."),
    "arterial": ("Study in the arterial phase.", "This patient was scanned after contrast, arterial phase."),
    "portal venous": ("Study in the portal venous phase.", "This patient received contrast, portal venous phase."),
}
COMPARISONS = (
    "Compared with the prior study.",
    "Comparison is made with the earlier examination.",
    "Follow-up study.",
)
NORMAL_IMPRESSIONS = (
    "No acute abnormality of the chest or abdomen.",
    "Normal study.",
    "Negative study of the chest and abdomen.",
    "No significant abnormality.",
    "Unremarkable examination.",
)
NORMAL_ENDINGS = ("No other significant abnormality.", "Otherwise normal.", "Remaining signs and organs unremarkable.")

_PROMPT_FRAMES = (
    ("{Name} is present.", "{Name} is not present."),
    ("This study is positive for {name}.", "This study is negative for {name}."),
    ("There are signs of {name} in the patient.", "There are no signs of {name} in the patient."),
)

# finding -> (positive, negative) prompts for zero-shot evaluation. No report contains one of these sentences.
EVALUATION_PROMPTS: dict[str, list[tuple[str, str]]] = {
    name: [
        tuple(frame.format(name=name, Name=name.capitalize()) for frame in frames)  # type: ignore[misc]
        for frames in _PROMPT_FRAMES
    ]
    for name in WORDINGS
}

__all__ = [
    "AFFIRMATIONS",
    "COMPARISONS",
    "EVALUATION_PROMPTS",
    "NEGATIONS",
    "NORMAL_ENDINGS",
    "NORMAL_IMPRESSIONS",
    "REGIONS",
    "TECHNIQUES",
    "WORDINGS",
    "Wording",
]
