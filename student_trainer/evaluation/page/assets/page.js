(function () {
  "use strict";
  var root = document.documentElement;
  var button = document.getElementById("theme");
  var themes = ["auto", "light", "dark"];
  function show(theme) {
    if (theme === "auto") { root.removeAttribute("data-theme"); } else { root.setAttribute("data-theme", theme); }
    button.textContent = "Theme: " + theme;
  }
  var kept = (location.hash.match(/theme=(light|dark)/) || [])[1];
  try { kept = kept || localStorage.getItem("lyceum-theme"); } catch (error) { /* a page from a file may keep nothing */ }
  var current = themes.indexOf(kept) < 0 ? 0 : themes.indexOf(kept);
  button.hidden = false;
  show(themes[current]);
  button.addEventListener("click", function () {
    current = (current + 1) % themes.length;
    show(themes[current]);
    try { localStorage.setItem("lyceum-theme", themes[current]); } catch (error) { /* as above */ }
  });
})();
