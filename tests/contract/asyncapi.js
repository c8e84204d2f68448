// Checks AsyncAPI documents with the official parser, and the examples of their messages with Ajv, because the parser
// does not compare them with their schemas. Arguments: files. Prints what is wrong, errors and warnings alike, and exits with 1 if anything is.
const fs = require("node:fs");
const { Parser } = require("@asyncapi/parser");
const Ajv = require("ajv").default;

// The documents are of AsyncAPI 3.0 on purpose: most tools do not read a later one yet.
const IGNORED = ["asyncapi-latest-version"];

function wrongExamples(document) {
  const wrong = [];
  for (const message of document.messages()) {
    // The parser has added names of its own to the schemas, which strict mode does not know.
    const ajv = new Ajv({ strict: false });
    for (const example of message.examples()) {
      for (const part of ["payload", "headers"]) {
        if (!ajv.validate(message[part]().json(), example[part]())) {
          wrong.push(`an example of ${message.name()}: ${part}: ${ajv.errorsText()}`);
        }
      }
    }
  }
  return wrong;
}

async function main(files) {
  let wrong = files.length === 0 ? 1 : 0;
  for (const file of files) {
    const { document, diagnostics } = await new Parser().parse(fs.readFileSync(file, "utf8"));
    const found = diagnostics.filter(({ code }) => !IGNORED.includes(code));
    found.forEach(({ code, message, path }) => console.log(`${file}: ${path.join(".")}: ${message} (${code})`));
    if (!document) console.log(`${file}: the parser gave no document`);
    const examples = document ? wrongExamples(document) : [];
    examples.forEach((line) => console.log(`${file}: ${line}`));
    wrong += found.length + examples.length + (document ? 0 : 1);
  }
  process.exit(wrong === 0 ? 0 : 1);
}

main(process.argv.slice(2));
