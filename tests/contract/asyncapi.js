// Checks AsyncAPI documents with the official parser, which also validates the examples of messages against their
// schemas. Arguments: files. Prints what is wrong, errors and warnings alike, and exits with 1 if anything is.
const fs = require("node:fs");
const { Parser } = require("@asyncapi/parser");

// The documents are of AsyncAPI 3.0 on purpose: most tools do not read a later one yet.
const IGNORED = ["asyncapi-latest-version"];

async function main(files) {
  let wrong = files.length === 0 ? 1 : 0;
  for (const file of files) {
    const { document, diagnostics } = await new Parser().parse(fs.readFileSync(file, "utf8"));
    const found = diagnostics.filter(({ code }) => !IGNORED.includes(code));
    found.forEach(({ code, message, path }) => console.log(`${file}: ${path.join(".")}: ${message} (${code})`));
    if (!document) console.log(`${file}: the parser gave no document`);
    wrong += found.length + (document ? 0 : 1);
  }
  process.exit(wrong === 0 ? 0 : 1);
}

main(process.argv.slice(2));
