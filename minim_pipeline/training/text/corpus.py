"""Medical sentences from templates: far more words and ways to say no than the captions hold.

Only the text encoder is trained on them, so that an unseen wording lands near one that the image model knows.
"""

import random
import re


def _split(words: str) -> list[str]:
    return [word.strip() for word in words.split(";")]


# What is written -> what the teacher reads: abbreviations, lay words and British spelling mean their long, plain form.
SYNONYMS = {
    "DME": "diabetic macular edema", "CSME": "clinically significant macular edema", "CME": "cystoid macular edema",
    "CI-DME": "center-involving diabetic macular edema", "DR": "diabetic retinopathy",
    "NPDR": "non-proliferative diabetic retinopathy", "PDR": "proliferative diabetic retinopathy",
    "NDR": "no diabetic retinopathy", "GON": "glaucomatous optic neuropathy", "POAG": "primary open-angle glaucoma",
    "CDR": "cup-to-disc ratio", "AMD": "age-related macular degeneration", "ARMD": "age-related macular degeneration",
    "CNV": "choroidal neovascularization", "ERM": "epiretinal membrane", "IRF": "intraretinal fluid",
    "SRF": "subretinal fluid", "PED": "pigment epithelial detachment", "RPE": "retinal pigment epithelium",
    "RVO": "retinal vein occlusion", "CSC": "central serous chorioretinopathy", "NV": "neovascularization",
    "MA": "microaneurysms", "CFP": "color fundus photograph", "WNL": "within normal limits",
    "GGO": "ground-glass opacity", "GGOs": "ground-glass opacities", "ARDS": "acute respiratory distress syndrome",
    "CAP": "community-acquired pneumonia", "LRTI": "lower respiratory tract infection",
    "COVID": "COVID-19 coronavirus", "SARS-CoV-2": "COVID-19 coronavirus", "2019-nCoV": "COVID-19 coronavirus",
    "corona": "COVID-19 coronavirus", "CXR": "chest x-ray", "NAD": "no abnormality detected",
    "RSV": "respiratory syncytial virus", "NSCLC": "non-small cell lung cancer", "SCLC": "small cell lung cancer",
    "SCC": "squamous cell carcinoma", "LUSC": "lung squamous cell carcinoma", "LUAD": "lung adenocarcinoma",
    "LCC": "large cell carcinoma", "LCLC": "large cell lung carcinoma", "epidermoid": "squamous cell",
    "LCNEC": "large cell neuroendocrine carcinoma", "TB": "tuberculosis", "PE": "pulmonary embolism",
    "COPD": "chronic obstructive pulmonary disease", "ILD": "interstitial lung disease", "HRCT": "high-resolution CT",
    "GBM": "glioblastoma", "HGG": "high-grade glioma", "LGG": "low-grade glioma", "glial": "glioma",
    "PitNET": "pituitary adenoma", "prolactinoma": "pituitary adenoma", "hypophyseal": "pituitary",
    "hypophysis": "pituitary gland", "astrocytoma": "astrocytoma glioma", "meningeal": "meninges",
    "BRVO": "branch retinal vein occlusion", "CRVO": "central retinal vein occlusion",
    "nAMD": "neovascular age-related macular degeneration", "MNV": "macular neovascularization",
    "SHRM": "subretinal hyperreflective material", "IRMA": "intraretinal microvascular abnormalities",
    "NVD": "neovascularization of the disc", "NVE": "neovascularization elsewhere",
    "medullated": "myelinated", "MRNF": "myelinated retinal nerve fibers", "RNFL": "retinal nerve fiber layer",
    "macular pucker": "epiretinal membrane", "HTN": "hypertension", "hypertonic": "hypertensive",
    "short-sighted": "myopic", "floaters": "vitreous opacities",
    "PTX": "pneumothorax", "PNA": "pneumonia", "CHF": "congestive heart failure", "CTR": "cardiothoracic ratio",
    "IPF": "idiopathic pulmonary fibrosis", "SPN": "solitary pulmonary nodule", "hydrothorax": "pleural effusion",
    "LLL": "left lower lobe", "LUL": "left upper lobe", "RLL": "right lower lobe", "RML": "right middle lobe",
    "RUL": "right upper lobe", "enlarged heart": "cardiomegaly", "DLGG": "diffuse low-grade glioma",
    "TNBC": "triple-negative breast cancer", "HER2+": "HER2-positive", "HER2/neu": "HER2", "ERBB2": "HER2",
    "ER+": "estrogen-receptor-positive", "HR+": "hormone-receptor-positive", "luminal": "hormone-receptor-positive",
    "ER-positive": "estrogen-receptor-positive", "HR-positive": "hormone-receptor-positive",
    "basal-like": "triple-negative", "oestrogen": "estrogen", "fibres": "fibers", "fibre": "fiber",
    "ischaemia": "ischemia", "ischaemic": "ischemic", "centre": "center",
    "IDC": "invasive ductal carcinoma", "DCIS": "ductal carcinoma in situ", "FA": "fibroadenoma",
    "oedema": "edema", "tumour": "tumor", "tumours": "tumors", "haemorrhage": "hemorrhage", "aetiology": "etiology",
    "haemorrhages": "hemorrhages", "colour": "color", "oedematous": "edematous", "paediatric": "pediatric",
    "swelling": "edema", "swollen": "edematous", "bleeds": "hemorrhages", "bleeding": "hemorrhage",
    "clouding": "opacity", "cloudy": "opaque", "shadowing": "opacity", "shadow": "opacity", "growth": "tumor",
    "neoplasm": "tumor", "papilla": "optic disc", "scan": "image", "film": "radiograph",
}  # fmt: skip

# Per body part: modality ids, sites, findings, diseases (those of the captions and many more).
REGIONS = {
    "retina": (
        ("oct", "fundus"),
        "macula; fovea; optic disc; optic nerve head; peripheral retina; inner retina; outer retina; choroid; "
        "posterior pole; vascular arcades; nasal retina; temporal retina; photoreceptor layer; ellipsoid zone; "
        "lens; vitreous; retinal pigment epithelium; nerve fiber layer; inner nuclear layer; foveal pit; "
        "neuroretinal rim; eye ground",
        "microaneurysms; dot hemorrhages; blot hemorrhages; flame hemorrhages; hard exudates; lipid deposits; "
        "cotton wool spots; soft exudates; venous beading; neovascularization; drusen; intraretinal cysts; "
        "subretinal fluid; cystoid spaces; retinal thickening; macular swelling; hyperreflective foci; edema; "
        "epiretinal membrane; rim thinning; optic cup enlargement; cupping; disc excavation; nerve fiber layer "
        "defect; lens opacity; media haze; atrophy; laser scars; vascular tortuosity; pigment clumping; vitreous "
        "hemorrhage; foveal distortion; serous detachment; fluid pockets; fatty exudate ring; papilledema; disc "
        "pallor; blurred vessels; red spots; white patches; pigment epithelial detachment; subretinal hyperreflective "
        "material; venous engorgement; arteriolar narrowing; arteriovenous nicking; macular striae; peripapillary "
        "atrophy; posterior staphyloma; tilted disc; vitreous opacities; geographic atrophy; subretinal hemorrhage; "
        "myelinated nerve fibers",
        "diabetic retinopathy; diabetic macular edema; cystoid macular edema; glaucoma; open-angle glaucoma; "
        "angle-closure glaucoma; ocular hypertension; cataract; nuclear cataract; age-related macular "
        "degeneration; macular hole; retinal detachment; retinal vein occlusion; retinal artery occlusion; "
        "hypertensive retinopathy; myopia; uveitis; retinitis pigmentosa; central serous chorioretinopathy; optic "
        "neuritis; diabetic maculopathy; retinopathy of prematurity; toxoplasmosis; lens clouding; diabetic eye "
        "disease; polypoidal vasculopathy; choroidal neovascularization; dry macular degeneration; wet macular "
        "degeneration; pathological myopia; branch retinal vein occlusion; central retinal vein occlusion; "
        "non-proliferative diabetic retinopathy; proliferative diabetic retinopathy; vitreous degeneration; asteroid "
        "hyalosis",
    ),
    "chest": (
        ("cxr", "chest_ct"),
        "upper lobe; middle lobe; lower lobe; lung base; lung apex; lung periphery; hilum; mediastinum; pleura; "
        "pleural space; bronchus; lung parenchyma; costophrenic angle; subpleural zone; perihilar region; heart; "
        "diaphragm; trachea; ribs; lingula; both lungs; lung fields; thorax; chest wall; main bronchus; lung "
        "zones",
        "consolidation; lobar consolidation; ground-glass opacities; patchy opacities; interstitial infiltrates; "
        "peribronchial thickening; air bronchograms; pleural effusion; pneumothorax; atelectasis; nodule; "
        "spiculated nodule; mass; cavity; crazy paving; reticular markings; hyperinflation; lymphadenopathy; "
        "infiltrate; airspace disease; haziness; lung opacity; fibrosis; bronchiectasis; emphysema; honeycombing; "
        "tree-in-bud nodules; septal thickening; cardiomegaly; pulmonary edema; scarring; calcification; pleural "
        "thickening; hilar enlargement; bronchial obstruction; hazy patches; streaky densities; white-out; dense "
        "shadow; necrotic mass; bulky mass; enlarged heart; perihilar haze; vascular congestion; Kerley lines; "
        "pleural line; blunted costophrenic angle; flattened diaphragm; volume loss; granuloma; smooth nodule",
        "bacterial pneumonia; viral pneumonia; COVID-19; coronavirus disease; pneumonia; lobar pneumonia; "
        "atypical pneumonia; influenza; tuberculosis; lung cancer; adenocarcinoma; squamous cell carcinoma; large "
        "cell carcinoma; small cell lung cancer; lung metastases; lymphoma; sarcoidosis; asthma; bronchitis; "
        "chronic obstructive pulmonary disease; pulmonary embolism; heart failure; interstitial lung disease; "
        "mesothelioma; lung abscess; bronchiolitis; respiratory infection; non-small cell lung cancer; carcinoid; "
        "undifferentiated lung tumor; fungal pneumonia; pneumococcal infection; glandular lung cancer; bronchial "
        "carcinoma; aspiration pneumonia; cardiogenic pulmonary edema; pulmonary fibrosis; hamartoma; benign nodule; "
        "empyema",
    ),
    "brain": (
        ("brain_mri",),
        "frontal lobe; temporal lobe; parietal lobe; occipital lobe; cerebellum; brainstem; corpus callosum; "
        "sella; sella turcica; pituitary gland; pituitary fossa; suprasellar cistern; optic chiasm; cavernous "
        "sinus; ventricles; white matter; gray matter; cortex; basal ganglia; thalamus; dura; meninges; "
        "convexity; falx; skull base; posterior fossa; sphenoid wing; hippocampus; cerebrum; brain parenchyma; "
        "skull; head; hemisphere",
        "mass; enhancing mass; ring-enhancing lesion; dural-based mass; dural tail; midline shift; mass effect; "
        "peritumoral edema; central necrosis; cystic lesion; hemorrhage; infarct; white matter lesions; "
        "hydrocephalus; atrophy; restricted diffusion; leptomeningeal enhancement; calcification; extra-axial "
        "lesion; intra-axial lesion; sellar mass; suprasellar extension; space-occupying lesion; infiltrating "
        "tumor; gliosis; heterogeneous enhancement; homogeneous enhancement; compression of the chiasm; growth; "
        "bone thickening",
        "glioma; glioblastoma; astrocytoma; oligodendroglioma; ependymoma; meningioma; pituitary adenoma; "
        "pituitary macroadenoma; prolactinoma; craniopharyngioma; brain metastases; lymphoma; schwannoma; "
        "medulloblastoma; multiple sclerosis; stroke; brain abscess; encephalitis; dementia; epilepsy; aneurysm; "
        "brain tumor; acromegaly; Cushing disease; glial neoplasm; tumor of the meninges; intracranial neoplasm; "
        "brain cancer; lower-grade glioma; high-grade glioma; diffuse astrocytoma",
    ),
    "breast": (
        ("breast_us", "breast_mri"),
        "upper outer quadrant; lower inner quadrant; retroareolar region; nipple; axilla; breast tissue; ducts; "
        "skin; fat; pectoral muscle; glandular tissue; breast",
        "hypoechoic mass; spiculated mass; oval circumscribed mass; irregular mass; posterior shadowing; "
        "posterior enhancement; cyst; calcifications; architectural distortion; ductal dilation; non-mass "
        "enhancement; washout; rim enhancement; skin thickening; lump; microlobulated margins; enlarged lymph "
        "node; solid nodule; enhancing mass; rapid enhancement; persistent enhancement; spiculated enhancing mass",
        "fibroadenoma; breast cancer; invasive ductal carcinoma; lobular carcinoma; ductal carcinoma in situ; "
        "benign tumor; malignant tumor; phyllodes tumor; fat necrosis; mastitis; papilloma; fibrocystic change; "
        "malignancy; triple-negative breast cancer; HER2-positive breast cancer; hormone-receptor-positive breast "
        "cancer; inflammatory breast cancer",
    ),
}  # fmt: skip

QUALIFIERS = _split(
    "mild; moderate; severe; early; advanced; subtle; marked; extensive; small; large; focal; diffuse; "
    "multifocal; bilateral; unilateral; scattered; patchy; peripheral; central; acute; chronic; new; old; "
    "recurrent; suspected; probable; typical; well-defined; ill-defined; left; right; left-sided; right-sided; "
    "progressive; minimal; dense; benign; malignant"
)
INTROS = _split(
    "image of; scan showing; findings:; impression:; there is; patient with; picture of; shows; example of; a "
    "case of; consistent with; suggestive of; evidence of; synthetic image of; typical; known; generate; photo "
    "of; appearance of"
)
TAILS = _split(
    "in an elderly patient; in a young adult; in a child; on follow-up; in a 54-year-old woman; in a 67-year-old "
    "man; before treatment; high quality; for screening; in a man; in a woman; on admission; in an outpatient; "
    "for research; axial slice"
)
AFFIRMED = _split(
    "{f}; {d}; {q} {f}; {q} {d}; {f} in the {s}; {q} {f} of the {s}; {d} with {f}; {d} with {q} {f}; {f} due to "
    "{d}; {d} involving the {s}; {f} and {g}; {s} with {f}; {f} caused by {d}; {f}, {d}; {s} showing {f}; {s} "
    "affected by {d}; {f} around the {s}; {d}, {q}; {f} typical of {d}; diagnosis: {d}; {d} proven by biopsy; {f} "
    "near the {s}"
)
NEGATED = _split(
    "no {f}; no {d}; without {f}; without {d}; {d} ruled out; {d} has been excluded; absence of {f}; {f} absent; "
    "negative for {d}; free of {f}; {d}-free; {s} without {f}; no evidence of {d}; no signs of {d}; no {f} in the "
    "{s}; {d} not present; does not show {f}; neither {f} nor {g}; nothing to suggest {d}; {s} clear of {f}; no "
    "{f}, no {g}; lack of {f}; never had {d}; excludes {d}; {f} not seen; cannot see any {f}; {d}: none; patient "
    "who does not have {d}; tested negative for {d}"
)
NORMAL = _split(
    "normal {s}; healthy {s}; unremarkable {s}; {s} is normal; {s} within normal limits; intact {s}; {s} well "
    "preserved; {s} without abnormality; nothing abnormal in the {s}; regular {s}; healthy person, {s}; {s} looks "
    "fine; physiological {s}; no pathology of the {s}; disease-free {s}; ordinary {s}; normal {s} and {t}; no "
    "abnormality; unaffected {s}; clear {s}"
)

_WORDS = {word.lower(): plain for word, plain in SYNONYMS.items()}
_SYNONYM = re.compile(r"(?<![\w-])(" + "|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)) + r")(?![\w-])")


def expand(text: str) -> str:
    """`text` in lower case with abbreviations and lay words spelt out, which is what the teacher understands."""
    return _SYNONYM.sub(lambda match: _WORDS[match[0]], text.lower())


def abbreviate(text: str, rng: random.Random) -> str:
    """The way back: one of the long forms in `text`, if it holds any, becomes a short or lay one."""
    found = [(word, plain) for word, plain in SYNONYMS.items() if re.search(rf"\b{re.escape(plain)}\b", text)]
    if not found:
        return text
    word, plain = rng.choice(found)
    return text.replace(plain, word, 1)


def generate(size: int, rng: random.Random) -> list[tuple[str, str, bool]]:
    """`size` sentences as (text, modality id, whether it denies or calls normal), most of them distinct."""
    regions = [(ids, _split(s), _split(f), _split(d)) for ids, s, f, d in REGIONS.values()]
    # The brain has one modality, the others have two each.
    weights = [3, 3, 2, 3]
    kinds = [(AFFIRMED, False), (NEGATED, True), (NORMAL, True)]
    sentences = []
    for _ in range(size):
        ids, sites, findings, diseases = rng.choices(regions, weights)[0]
        templates, negated = rng.choices(kinds, (5, 3, 1))[0]
        f, g = rng.sample(findings, 2)
        s, t = rng.sample(sites, 2)
        text = rng.choice(templates).format(f=f, g=g, s=s, t=t, d=rng.choice(diseases), q=rng.choice(QUALIFIERS))
        sentences.append((text, rng.choice(ids), negated))
    return sentences


def decorate(text: str, rng: random.Random) -> str:
    """`text` with words around it that change nothing of what is to be seen."""
    if rng.random() < 0.25:
        text = f"{rng.choice(INTROS)} {text}"
    if rng.random() < 0.2:
        text = f"{text.removesuffix('.')} {rng.choice(TAILS)}"
    return text
