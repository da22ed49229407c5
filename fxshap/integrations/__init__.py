"""How SHAP, Captum and tangermeme are recognised."""
