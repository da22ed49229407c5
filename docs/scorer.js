/* The order of search results: a query of several words is likely a message, whose page comes first. */
var Scorer = {
  score: (result) => {
    const [docname, , , , score] = result;
    const query = new URLSearchParams(window.location.search).get("q") || "";
    const words = query.trim().split(/\s+/).length;
    return docname === "troubleshooting" && words >= 3 ? score + 30 : score;
  },
  // The rest is Sphinx's own.
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
