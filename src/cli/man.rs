//! `spooltap man` and `spooltap completions`: what packages install beside the program, made from the options themselves.

use super::exit::EXITS;
use super::{Cli, Exit, Outcome};
use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// Directory that gets spooltap.1 and a page for each command
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell they are for
    shell: Shell,
}

/// Writes the pages.
pub(super) fn man(args: &ManArgs) -> Outcome {
    let unwritable = || format!("{} cannot be written", args.dir.display());
    std::fs::create_dir_all(&args.dir).with_context(unwritable)?;
    // A page has a section for the codes, the plain help a paragraph.
    let command = Cli::command().after_help(None::<&str>).disable_help_subcommand(true);
    clap_mangen::generate_to(command.clone(), &args.dir).with_context(unwritable)?;
    let page = Man::new(command);
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    page.render_subcommands_section(&mut text)?;
    let mut codes = Roff::default();
    codes.control("SH", ["EXIT STATUS"]);
    for (exit, meaning) in EXITS {
        codes.control("TP", []);
        codes.text([bold((*exit as u8).to_string())]);
        codes.text([roman(*meaning)]);
    }
    codes.to_writer(&mut text)?;
    page.render_version_section(&mut text)?;
    std::fs::write(args.dir.join("spooltap.1"), text).with_context(unwritable)?;
    Ok(Exit::Ok)
}

/// Prints the completions.
pub(super) fn completions(args: &CompletionsArgs) -> Outcome {
    clap_complete::generate(args.shell, &mut Cli::command(), "spooltap", &mut std::io::stdout().lock());
    Ok(Exit::Ok)
}
