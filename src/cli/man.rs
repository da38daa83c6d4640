//! `spooltap man` and `spooltap completions`: what packages install beside the program, made from the options themselves;
//! with two pages written by hand.

use super::exit::EXITS;
use super::{Cli, Exit, Outcome};
use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// Directory that gets spooltap.1, a page for each command, spooltap.7 and spooltap.toml.5
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell they are for
    shell: Shell,
}

/// Of the pages made from the options.
const DATE: &str = "2026-11-27";

/// Written by hand.
const PAGES: [(&str, &str); 2] = [
    ("spooltap.7", include_str!("../../docs/man/spooltap.7")),
    ("spooltap.toml.5", include_str!("../../docs/man/spooltap.toml.5")),
];

/// Writes the pages.
pub(super) fn man(args: &ManArgs) -> Outcome {
    let unwritable = || format!("{} cannot be written", args.dir.display());
    std::fs::create_dir_all(&args.dir).with_context(unwritable)?;
    // A page has a section for the codes, the plain help a paragraph.
    let mut command = Cli::command().after_help(None::<&str>).disable_help_subcommand(true);
    command.build();
    let mut commands = vec![&command];
    while let Some(one) = commands.pop() {
        commands.extend(one.get_subcommands().filter(|command| !command.is_hide_set()));
        let file = format!("{}.1", called(one));
        std::fs::write(args.dir.join(file), page(one)?).with_context(unwritable)?;
    }
    for (name, text) in PAGES {
        std::fs::write(args.dir.join(name), text).with_context(unwritable)?;
    }
    Ok(Exit::Ok)
}

/// `spooltap-state-drop`, for example.
fn called(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

/// The page of a command; the first one has the codes as well.
fn page(command: &Command) -> std::io::Result<Vec<u8>> {
    let first = command.get_name() == "spooltap";
    let source = concat!("spooltap ", env!("CARGO_PKG_VERSION"));
    let page =
        Man::new(command.clone()).title(called(command).to_uppercase()).date(DATE).source(source).manual("spooltap");
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    if command.get_after_help().is_some() {
        page.render_extra_section(&mut text)?;
    }
    let mut rest = Roff::default();
    if first {
        rest.control("SH", ["EXIT STATUS"]);
        for (exit, meaning) in EXITS {
            rest.control("TP", []);
            rest.text([bold((*exit as u8).to_string())]);
            rest.text([roman(*meaning)]);
        }
    }
    rest.control("SH", ["SEE ALSO"]);
    let pages: &[&str] = &["spooltap(1), ", "spooltap.toml(5), ", "spooltap(7)"];
    rest.text(pages[usize::from(first)..].iter().map(|page| roman(*page)).collect::<Vec<_>>());
    rest.to_writer(&mut text)?;
    // What clap breaks into lines ends them with blanks.
    let text = String::from_utf8_lossy(&text).replace(".br\n\n.br\n", ".sp\n");
    Ok(text.lines().flat_map(|line| [line.trim_end(), "\n"]).collect::<String>().into_bytes())
}

/// Prints the completions.
pub(super) fn completions(args: &CompletionsArgs) -> Outcome {
    clap_complete::generate(args.shell, &mut Cli::command(), "spooltap", &mut std::io::stdout().lock());
    Ok(Exit::Ok)
}
